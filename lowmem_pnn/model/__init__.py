"""A model as a chain of layers, with its tensors, modes and state; compute precision."""

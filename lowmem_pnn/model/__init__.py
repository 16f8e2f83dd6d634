"""A model as a chain of layers: traced, cut, compiled; compute precision."""

"""The cost of each layer, in bytes and in seconds."""

"""A model as a chain of layers: traced, cut, compiled; what its layers compute in."""

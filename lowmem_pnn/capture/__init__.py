"""Capturing: a model is run on fake tensors, traced, opened where it is large, and cut into a chain of layers."""

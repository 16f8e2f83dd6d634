"""Bytes on disk: weights, activations, journals."""

"""Quantization: weights in smaller types than that of computing."""

"""Pretrained weights: files that others wrote, read a tensor at a time, and which of their tensors a model takes."""

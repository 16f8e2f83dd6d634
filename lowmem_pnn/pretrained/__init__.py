"""Pretrained networks: files of weights that others wrote, which of their tensors a model takes, and what of it is frozen."""

"""Compilation of layers by PyTorch's compiler."""

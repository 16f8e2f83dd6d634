"""Contenders: every method, and plain PyTorch beside it, a few steps each in a process of its own that is watched from outside."""

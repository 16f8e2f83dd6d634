"""Exports of trained models: weights, programs, ONNX, and folders for transformers."""

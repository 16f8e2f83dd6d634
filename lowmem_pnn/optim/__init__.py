"""Optimizers with state by name, quantized state, learning-rate schedules."""

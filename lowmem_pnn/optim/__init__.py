"""Optimizers with state by name, state in fewer bytes, learning-rate schedules."""

"""Samples on their way from a data set to the model: augmented, normalised, and read by processes of the host."""

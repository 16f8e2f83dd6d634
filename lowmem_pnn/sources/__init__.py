"""Models and data sets, by name or as Python objects."""

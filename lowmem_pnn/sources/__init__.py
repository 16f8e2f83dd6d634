"""Data sets, by name or as Python objects."""

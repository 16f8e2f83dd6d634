"""Trials of reliability: scripts that try a run hundreds of times. `tests/system` runs each, in a short form, or whole with `--long`."""

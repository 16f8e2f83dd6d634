"""A run in its directory: its state, its commits, its partitions, its metrics."""

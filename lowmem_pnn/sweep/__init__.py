"""One batch forward through all partitions and back: exact training, and recovery."""

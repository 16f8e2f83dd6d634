"""Where to cut, with which micro-batches, and in how many seconds."""

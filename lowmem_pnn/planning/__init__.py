"""Planning: where to cut, with which micro-batches, and how many seconds training takes."""

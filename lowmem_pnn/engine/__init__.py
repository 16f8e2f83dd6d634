"""One resident partition at work: load, prefetch, forward, backward, step."""

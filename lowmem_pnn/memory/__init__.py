"""Host memory: aligned, pooled, page-locked, metered."""

"""Host memory: aligned, pooled, page-locked, metered; glibc's heap."""

"""The C library of this process, opened once."""

import ctypes
from functools import cache


@cache
def libc() -> ctypes.CDLL:
    """Return the C library.

    Opened once: a `CDLL` has a class of its own, which refers to itself and stays until garbage is collected. The heap is trimmed after
    every residency, and what old generations of garbage hold of it would grow for hundreds of them.

    Raises:
        OSError: This system's C library cannot be opened.
    """
    return ctypes.CDLL(None)

"""The heap of glibc's malloc: when freed blocks go back to the system (mmap and trim thresholds, malloc_trim)."""

import contextlib
import time

from lowmem_pnn.memory.libc import libc
from lowmem_pnn.memory.process_meter import private_bytes
from lowmem_pnn.memory.tunables import has_tidy_heap
from lowmem_pnn.units import MEBIBYTE

# glibc's names for mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# The largest mmap threshold that glibc accepts on 64 bits.
_LARGEST_THRESHOLD = 32 * MEBIBYTE


def fix_malloc_thresholds(budget_bytes: int) -> None:
    """Make glibc give large freed blocks back at once.

    Left alone it raises its mmap threshold to the size of each freed block (up to 32 MiB), after which freed tensors stay in the heap
    and the peak is fragmentation. Memory that was given back is zeroed, page by page, when it is used again, so that the thresholds
    grow with the budget. A tidy heap keeps all that is freed, until `HeapTrimmer` finds too much in use: there a freed block is room
    for the next one. Elsewhere than on glibc this does nothing.

    Args:
        budget_bytes: memory budget; blocks from a 64th of it on are given back (256 KiB to 8 MiB), and so is the heap's free end (1 to
            8 MiB).
    """
    is_tidy = has_tidy_heap()
    with contextlib.suppress(OSError, AttributeError):
        libc().mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD if is_tidy else mmap_threshold(budget_bytes))
        libc().mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD if is_tidy else trim_threshold(budget_bytes))


def mmap_threshold(budget_bytes: int) -> int:
    """Return from how many bytes on a block is no part of the heap, and given back when it is freed."""
    return min(max(budget_bytes // 64, MEBIBYTE // 4), 8 * MEBIBYTE)


def trim_threshold(budget_bytes: int) -> int:
    """Return how many bytes of the heap's free end are kept."""
    return min(max(budget_bytes // 64, MEBIBYTE), 8 * MEBIBYTE)


def trim_heap() -> None:
    """Give the heap's free pages back to the system, those between used ones too (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        libc().malloc_trim(0)


class HeapTrimmer:
    """Gives the heap's free pages back while more memory is in use than expected.

    Blocks from the heap are fast, since their pages stay. But where blocks of many sizes come and go (activations are freed while
    gradients are allocated), the holes between blocks can be half as much again as the memory in use. Below a level nothing is done.

    Args:
        level_bytes: private memory up to which nothing is done.
    """

    _WORTHWHILE = MEBIBYTE
    # Seconds between two trims.
    _SHORTEST, _LONGEST = 0.004, 0.5

    def __init__(self, level_bytes: int) -> None:
        self.set_level(level_bytes)

    def set_level(self, level_bytes: int) -> None:
        """Change the level, at any time, and trim again without a pause."""
        self._level_bytes = level_bytes
        self._pause, self._next = self._SHORTEST, 0.0

    def is_above_level(self, private: int) -> bool:
        """Return whether so many bytes in use are more than what is expected."""
        return private > self._level_bytes

    def trim_above_level(self, private: int) -> int:
        """Trim the heap if a sample is above the level; called often.

        Args:
            private: bytes in use.

        Returns:
            The bytes that were given back.
        """
        if not self.is_above_level(private) or time.monotonic() < self._next:
            return 0
        trim_heap()
        # A heap without free pages stays so for a while, and trimming holds up every thread that allocates.
        freed = private - private_bytes()
        self._pause = min(2 * self._pause, self._LONGEST) if freed < self._WORTHWHILE else self._SHORTEST
        self._next = time.monotonic() + self._pause
        return max(0, freed)

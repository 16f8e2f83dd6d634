"""Tunables of glibc's malloc, set before a process starts: huge pages, and a heap in which freed blocks are found again."""

import os

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = {"glibc.malloc.hugetlb": "1"}
_TIDY = {"glibc.malloc.tcache_count": "0", "glibc.malloc.mxfast": "0", "glibc.malloc.arena_max": "1"}


def with_tunables(tunables: str) -> str:
    """Return settings of glibc for a process that trains, as far as the user has not chosen: huge pages, and a tidy heap.

    Every batch allocates its gradients anew; in pages of 4 kB, a quarter of a step went to page faults. And blocks that are freed
    should be there for the next ones of their size. But an aligned block, as PyTorch asks for it, is cut out of one that is up to 96
    bytes larger, and what is cut off goes to lists of small blocks (tcache, fastbins), from which it never grows together again with
    its neighbours: the hole that the block leaves is then too small for the next one of the same size. Without these lists it is not.
    One arena for all threads: what one has freed is there for the others.

    Args:
        tunables: value of the variable GLIBC_TUNABLES.

    Example:
        >>> with_tunables("glibc.malloc.hugetlb=0")
        'glibc.malloc.hugetlb=0:glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.arena_max=1'
    """
    ours = (f"{name}={value}" for name, value in {**_HUGE_PAGES, **_TIDY}.items() if name not in tunables)
    return ":".join(filter(None, [tunables, *ours]))


def has_tidy_heap() -> bool:
    """Whether this process was started with the tunables of a tidy heap, so that blocks of any size may come from the heap."""
    given = os.environ.get(_TUNABLES, "").split(":")
    return all(f"{name}={value}" in given for name, value in _TIDY.items())

"""Page-cache prefetch: the next partition's weight file is read by the kernel while the last epoch of the present one runs.

The next partition cannot be resident before this one leaves, and in memory of ours it would count against the budget wherever the host
is the device. The page cache is the kernel's, which gives it up when somebody needs the memory.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import islice
from pathlib import Path

from lowmem_pnn.methods import Sweep, Visit
from lowmem_pnn.stores import disk


class PageCachePrefetch:
    """Has a file read by the kernel, a share at a time, so that what else the reading thread does is not held up.

    Args:
        path: the file; None for nothing to do.
        pool: a thread that reads.
    """

    def __init__(self, path: Path | None, pool: Executor) -> None:
        self._path = path
        self._pool = pool
        self._asked = 0
        self._size = 0 if path is None or not path.exists() else path.stat().st_size
        if disk.outgrows_page_cache(self._size):
            self._size = 0  # its own end would push its beginning out

    def prefetch(self, share: float) -> None:
        """Ask for more of the file.

        Args:
            share: part of the file that is to be there soon, 0 to 1.
        """
        until = min(self._size, int(self._size * share))
        if self._path is not None and until > self._asked:
            self._pool.submit(disk.prefetch_into_page_cache, self._path, self._asked, until)
            self._asked = until


def next_partition(program: Sequence[Visit | Sweep], visit: int) -> int | None:
    """Return the partition whose weights are read next after a visit's; None where none is, or a sweep's own stream sees to them.

    Args:
        program: visits and sweeps of a run.
        visit: position of the visit in it.
    """
    present = program[visit]
    assert isinstance(present, Visit)
    for item in islice(program, visit + 1, None):
        if isinstance(item, Sweep) or item.action in ("join", "meta"):
            return None
        if item.partition != present.partition:
            return item.partition
    return None

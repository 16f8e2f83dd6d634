"""The run's background threads, one for each kind of work."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait

from lowmem_pnn.engine.stalls import Stalls

_NUM_BESIDE = 4


class WorkerThreads:
    """The run's background threads, one for each kind of work; started before the floor is taken, since their stacks count.

    `stalls` is the clock of what the computing thread waits for.
    """

    def __init__(self) -> None:
        self.stalls = Stalls()
        self.read = ThreadPoolExecutor(1, "lowmem-read")
        self.write = ThreadPoolExecutor(1, "lowmem-write")
        # Checksums, and syncs: several of these at once share the drive's emptying its cache.
        self.beside = ThreadPoolExecutor(_NUM_BESIDE, "lowmem-beside")
        self.commit = ThreadPoolExecutor(1, "lowmem-commit")
        started = threading.Barrier(_NUM_BESIDE)
        wait([self.beside.submit(started.wait) for _ in range(_NUM_BESIDE)])
        for pool in self._pools():
            pool.submit(int).result()

    def close(self) -> None:
        """Wait for what is under way, and end the threads."""
        for pool in self._pools():
            pool.shutdown()

    def _pools(self) -> tuple[ThreadPoolExecutor, ...]:
        # In the order of their closing: who gives others work goes before them.
        return self.read, self.write, self.beside, self.commit

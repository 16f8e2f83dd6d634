"""Background threads of a run: a pool each for reading, writing, syncs and commits."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait

from lowmem_pnn.engine.stalls import Stalls

_NUM_SYNC_THREADS = 4


class WorkerThreads:
    """The background threads of a run, and the counter of the time that the computing thread waits for them.

    All threads start here, before a device measures its floor, since their stacks take memory.
    """

    def __init__(self) -> None:
        self.stalls = Stalls()
        self.read = ThreadPoolExecutor(1, "lowmem-read")
        self.write = ThreadPoolExecutor(1, "lowmem-write")
        # Checksums and syncs: the drive empties its cache once for several syncs at the same time.
        self.sync = ThreadPoolExecutor(_NUM_SYNC_THREADS, "lowmem-sync")
        self.commit = ThreadPoolExecutor(1, "lowmem-commit")
        started = threading.Barrier(_NUM_SYNC_THREADS)
        wait([self.sync.submit(started.wait) for _ in range(_NUM_SYNC_THREADS)])
        for pool in self._pools():
            pool.submit(int).result()

    def close(self) -> None:
        """Wait for the work under way, and end the threads."""
        for pool in self._pools():
            pool.shutdown()

    def _pools(self) -> tuple[ThreadPoolExecutor, ...]:
        """Return the pools in the order in which they are closed: a pool that submits work to another one comes before it."""
        return self.read, self.write, self.sync, self.commit

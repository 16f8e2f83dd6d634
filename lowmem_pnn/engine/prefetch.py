"""Streams between disk and device: the run's threads, tensors read ahead of their use, and tensors written behind it.

    disk --reads, in a known order--> [ window of bytes ] --take--> device --submit--> [ window of bytes ] --> disk

What waits in either window is in memory, and in the plan.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Request:
    """A tensor that will be needed.

    Args:
        nbytes: of it.
        read: gets it, on the reading thread.
    """

    nbytes: int
    read: Callable[[], Tensor]


class Prefetcher:
    """Reads tensors in the order of their use, ahead of it.

    Args:
        requests: asked for one after the other, when there is room.
        pool: one thread that reads.
        window_bytes: of tensors that were read, or are being read, and not taken; a larger tensor is read alone.

    Example:
        >>> import torch
        >>> with ThreadPoolExecutor(1) as pool:
        ...     ahead = Prefetcher((Request(8, lambda n=n: torch.tensor(n)) for n in range(3)), pool, window_bytes=16)
        ...     [ahead.take().item() for _ in range(3)]
        [0, 1, 2]
    """

    def __init__(self, requests: Iterable[Request], pool: Executor, window_bytes: int) -> None:
        self._requests: Iterator[Request] = iter(requests)
        self._next: Request | None = next(self._requests, None)
        self._pool = pool
        self._window_bytes = window_bytes
        self._waiting: deque[tuple[Future[Tensor], int]] = deque()
        self._waiting_bytes = 0

    def start(self) -> None:
        """Ask for as much as there is room for."""
        while self._next is not None:
            request = self._next
            if self._waiting and self._waiting_bytes + request.nbytes > self._window_bytes:
                return
            self._waiting.append((self._pool.submit(request.read), request.nbytes))
            self._waiting_bytes += request.nbytes
            self._next = next(self._requests, None)

    def take(self) -> Tensor:
        """The next tensor; the caller's alone."""
        if not self._waiting:
            self.start()
        assert self._waiting, "more is taken than was requested"
        future, nbytes = self._waiting.popleft()
        tensor = future.result()
        del future  # it holds the tensor
        self._waiting_bytes -= nbytes
        self.start()
        return tensor

    def close(self) -> None:
        """Drop what was read and not taken, and wait for what is being read."""
        waiting = [future for future, _ in self._waiting if not future.cancel()]
        wait(waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        self._next = None


class WriteBehind:
    """Lets a thread do writes later, holding what they write.

    Args:
        pool: one thread that writes, in the order of submission.
        window_bytes: of writes that wait; a larger one waits alone.
    """

    def __init__(self, pool: Executor, window_bytes: int) -> None:
        self._pool = pool
        self._window_bytes = window_bytes
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._waiting_bytes = 0

    def submit(self, nbytes: int, work: Callable[[], None]) -> Future[None]:
        """Have a write done, after those before it.

        Args:
            nbytes: that it holds in memory until then.
            work: does it, on the writing thread.

        Raises:
            DiskError: of an earlier write.
        """
        while self._waiting and (self._waiting_bytes + nbytes > self._window_bytes or self._waiting[0][0].done()):
            self._finish_first()
        future = self._pool.submit(work)
        self._waiting.append((future, nbytes))
        self._waiting_bytes += nbytes
        return future

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            DiskError: something could not be.
        """
        while self._waiting:
            self._finish_first()

    def abandon(self) -> None:
        """Wait until nothing is being written any more, whatever comes of it."""
        wait([future for future, _ in self._waiting])
        self._waiting.clear()
        self._waiting_bytes = 0

    def _finish_first(self) -> None:
        future, nbytes = self._waiting.popleft()
        self._waiting_bytes -= nbytes
        future.result()

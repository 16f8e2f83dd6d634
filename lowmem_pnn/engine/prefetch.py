"""Prefetch and write-behind: tensors are read before they are needed, and written while the computing goes on.

    disk --reads, in a known order--> [ tensors that wait ] --take--> device --submit--> [ tensors that wait ] --> disk

Tensors that wait are in memory, on either side within a limit that plans count.
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
        nbytes: size of the tensor.
        read: function that reads the tensor; called on the reading thread.
        early: whether the tensor is read before it is needed; a tensor that is too large to wait is read when it is taken.
    """

    nbytes: int
    read: Callable[[], Tensor]
    early: bool = True


class Prefetcher:
    """Reads tensors in the order of their use, before they are needed.

    Args:
        requests: requests in the order of use; each is asked for when there is room for its tensor.
        pool: pool of one thread, which reads.
        limit_bytes: most bytes of tensors that are being read, or wait to be taken; a larger tensor is read alone.

    Example:
        >>> import torch
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> with ThreadPoolExecutor(1) as pool:
        ...     prefetcher = Prefetcher((Request(8, lambda n=n: torch.tensor(n)) for n in range(3)), pool, limit_bytes=16)
        ...     [prefetcher.take().item() for _ in range(3)]
        [0, 1, 2]
    """

    def __init__(self, requests: Iterable[Request], pool: Executor, limit_bytes: int) -> None:
        self._requests: Iterator[Request] = iter(requests)
        self._next: Request | None = next(self._requests, None)
        self._pool = pool
        self._limit_bytes = limit_bytes
        self._waiting: deque[tuple[Future[Tensor], int]] = deque()
        self._waiting_bytes = 0

    def start(self) -> None:
        """Begin to read the next tensors, as many as there is room for."""
        while self._next is not None and self._next.early:
            if self._waiting and self._waiting_bytes + self._next.nbytes > self._limit_bytes:
                return
            self._begin(self._next)

    def take(self) -> Tensor:
        """Return the next tensor, which only the caller holds then; wait until it is read."""
        if not self._waiting:
            self.start()
        if not self._waiting:
            assert self._next is not None, "more is taken than was requested"
            self._begin(self._next)
        future, nbytes = self._waiting.popleft()
        tensor = future.result()
        del future  # it holds the tensor
        self._waiting_bytes -= nbytes
        self.start()
        return tensor

    def take_ready(self) -> Tensor | None:
        """Return the next tensor as `take` does, if it is there already; None where it is being read, or its reading has failed."""
        if not self._waiting or not self._waiting[0][0].done() or self._waiting[0][0].exception() is not None:
            return None
        return self.take()

    def _begin(self, request: Request) -> None:
        self._waiting.append((self._pool.submit(request.read), request.nbytes))
        self._waiting_bytes += request.nbytes
        self._next = next(self._requests, None)

    def close(self) -> None:
        """Drop the tensors that were not taken, and wait for the read under way."""
        waiting = [future for future, _ in self._waiting if not future.cancel()]
        wait(waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        self._next = None


class WriteBehind:
    """Writes on a thread of its own, while the caller goes on; the tensors to be written stay in memory until then.

    Args:
        pool: pool of one thread, which writes in the order of submission.
        limit_bytes: most bytes of tensors that wait to be written; a larger tensor waits alone.
    """

    def __init__(self, pool: Executor, limit_bytes: int) -> None:
        self._pool = pool
        self._limit_bytes = limit_bytes
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._waiting_bytes = 0

    def submit(self, nbytes: int, write_fn: Callable[[], None]) -> Future[None]:
        """Begin a write, to be done after the earlier ones; wait where there is no room for its tensor.

        Args:
            nbytes: size of the tensor that the write holds in memory.
            write_fn: function that writes; called on the writing thread.

        Raises:
            DiskError: an earlier write failed.
        """
        while self._waiting and (self._waiting_bytes + nbytes > self._limit_bytes or self._waiting[0][0].done()):
            self._finish_first()
        return self._submit(nbytes, write_fn)

    def submit_close(self, close_fn: Callable[[], None]) -> None:
        """Close a file after the earlier writes, whatever came of them: their errors are left to the next `submit`, or to `wait`.

        Args:
            close_fn: function that closes the file; called on the writing thread.
        """
        self._submit(0, close_fn)

    def _submit(self, nbytes: int, write_fn: Callable[[], None]) -> Future[None]:
        future = self._pool.submit(write_fn)
        self._waiting.append((future, nbytes))
        self._waiting_bytes += nbytes
        return future

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            DiskError: a write failed.
        """
        while self._waiting:
            self._finish_first()

    def abandon(self) -> None:
        """Wait until no write is under way, and forget all of them, with their errors."""
        wait([future for future, _ in self._waiting])
        self._waiting.clear()
        self._waiting_bytes = 0

    def _finish_first(self) -> None:
        future, nbytes = self._waiting.popleft()
        self._waiting_bytes -= nbytes
        future.result()

"""A memory pool: blocks of host memory that are used again, for tensors that are read from disk over and over.

To read a large tensor into fresh memory takes three to four times as long: the system zeroes every page at its first touch. A block
comes back to the pool when the last tensor over it is gone.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from lowmem_pnn.memory.aligned import PAGE_BYTES, aligned_empty

# Smaller tensors come from the heap of malloc, whose pages stay after each use.
_SMALLEST_BLOCK_BYTES = 1 << 18


class MemoryPool:
    """A pool that makes uninitialised host tensors; safe to share between threads.

    Example:
        >>> pool = MemoryPool(limit_bytes=1 << 20)
        >>> tensor = pool.empty((512, 512), torch.float32)
        >>> address = tensor.data_ptr()
        >>> del tensor
        >>> pool.empty((1024, 256), torch.float32).data_ptr() == address
        True

    Args:
        limit_bytes: size of all blocks, used and free: free ones are let go to stay below the limit. Used ones alone may exceed it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._free: list[Tensor] = []
        # Blocks whose tensors are gone. They come from finalizers, which may run at any moment, in the middle of the methods below too.
        self._returned: deque[Tensor] = deque()
        self._held_bytes = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of all blocks, used and free."""
        with self._lock:
            self._make_room(0)
            return self._held_bytes

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Make an uninitialised tensor on the CPU that starts at a multiple of 64 bytes."""
        shape = tuple(shape)
        nbytes = prod(shape) * dtype.itemsize
        if nbytes < _SMALLEST_BLOCK_BYTES:
            return aligned_empty(shape, dtype)
        block = self._take(nbytes)
        memory = block.numpy()
        finalizer = weakref.finalize(memory, self._returned.append, block)
        finalizer.atexit = False
        # The tensor's storage holds this array, so the finalizer runs when the last tensor over it is gone.
        return torch.from_numpy(memory).view(dtype).view(shape)

    def set_limit(self, limit_bytes: int) -> None:
        """Change the limit, and let free blocks go to keep to it."""
        with self._lock:
            self._limit_bytes = limit_bytes
            self._make_room(0)

    def keep_to_limit(self) -> None:
        """Let free blocks go that exceed the limit; tensors that are freed do not do so by themselves."""
        with self._lock:
            self._make_room(0)

    def clear(self) -> None:
        """Let all free blocks go."""
        with self._lock:
            self._collect()
            self._held_bytes -= sum(block.nbytes for block in self._free)
            self._free.clear()

    def _take(self, nbytes: int) -> Tensor:
        with self._lock:
            self._collect()
            for number, block in enumerate(self._free):
                if block.nbytes == nbytes:
                    return self._free.pop(number)
            self._make_room(nbytes)
        # Aligned to pages, for direct transfers.
        block = aligned_empty((nbytes,), torch.uint8, alignment=PAGE_BYTES)
        with self._lock:
            self._held_bytes += nbytes
        return block

    def _collect(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())

    def _make_room(self, nbytes: int) -> None:
        """Let the least recently used blocks go until so many bytes more stay below the limit, or none is left."""
        self._collect()
        while self._free and self._held_bytes + nbytes > self._limit_bytes:
            self._held_bytes -= self._free.pop(0).nbytes

"""Page-locked (pinned) host memory: one slab, of which pieces are lent for asynchronous copies."""

import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from lowmem_pnn.memory.aligned import ALIGNMENT
from lowmem_pnn.units import MEBIBYTE


def slab_bytes_of(budget_bytes: int, max_host_mem: int | None = None) -> int:
    """Return the size of a device's page-locked slab: a sixteenth of the budget, rounded down to a power of two, at least 1 MiB.

    A power of two, since PyTorch's allocator of page-locked memory rounds up to one.

    Args:
        budget_bytes: budget of the device.
        max_host_mem: bound on the host's memory, of which it is an eighth at most; None where there is none.

    Example:
        >>> slab_bytes_of(2_000_000_000) // MEBIBYTE, slab_bytes_of(1000) // MEBIBYTE
        (64, 1)
        >>> slab_bytes_of(40_000_000_000, 2_000_000_000) // MEBIBYTE
        128
    """
    most = budget_bytes // 16 if max_host_mem is None else min(budget_bytes // 16, max_host_mem // 8)
    return max(MEBIBYTE, 1 << max(0, most.bit_length() - 1))


class PinnedSlab:
    """One slab of page-locked memory, whose pieces are lent as tensors; safe to share between threads.

    The slab is allocated when the first piece is asked for. Where the system refuses it, nothing is ever lent.

    One slab, and not a block for each tensor: page-locked memory is slow to allocate, PyTorch keeps freed page-locked blocks for ever,
    in sizes that nobody may ask for again, and the tensors of one phase of a run (weights) and of the next (samples) have other
    sizes. A piece comes back when the last tensor over it is gone, so whoever starts a copy holds the tensor until the copy is
    complete.

    Args:
        allocate: function that makes a page-locked tensor of so many bytes (uint8).
        size: size of the slab in bytes: all memory that is ever page-locked.

    Example:
        >>> slab = PinnedSlab(lambda size: torch.empty(size, dtype=torch.uint8), 1024)
        >>> tensor = slab.lend((4, 8), torch.float32)
        >>> slab.lent_bytes, slab.owns(tensor), slab.lend((1000,), torch.float32) is None
        (128, True, True)
        >>> del tensor
        >>> slab.lent_bytes
        0
    """

    def __init__(self, allocate: Callable[[int], Tensor], size: int) -> None:
        self._allocate = allocate
        self.size = size
        self._slab: Tensor | None = None
        # Offset and size of the free ranges, by offset; no two are adjacent.
        self._free: list[tuple[int, int]] = [(0, size)]
        self._lent: dict[int, int] = {}
        # Offsets of pieces whose tensors are gone. They come from finalizers, which may run at any moment, in the middle of the
        # methods below too.
        self._returned: deque[int] = deque()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the slab once it is allocated, 0 before."""
        return 0 if self._slab is None else self._slab.nbytes

    @property
    def lent_bytes(self) -> int:
        """Bytes of all pieces that are lent, each rounded up to a multiple of 64."""
        with self._lock:
            self._collect()
            return sum(self._lent.values())

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Tensor | None:
        """Lend an uninitialised page-locked tensor that starts at a multiple of 64 bytes.

        Args:
            shape: shape in elements.
            dtype: type of the elements.
            strides: strides of a dense tensor, in elements; None for a contiguous one.

        Returns:
            The tensor; None if there is no room for it now.
        """
        nbytes = prod(shape) * dtype.itemsize
        with self._lock:
            if (offset := self._take(-(-max(1, nbytes) // ALIGNMENT) * ALIGNMENT)) is None:
                return None
            if self._slab is None and not self._allocate_slab():
                return None
            assert self._slab is not None
            memory = self._slab.numpy()[offset : offset + nbytes]
        finalizer = weakref.finalize(memory, self._returned.append, offset)
        finalizer.atexit = False
        # The tensor's storage holds this array, so the finalizer runs when the last tensor over it is gone.
        tensor = torch.from_numpy(memory).view(dtype)
        return tensor.view(shape) if strides is None else tensor.as_strided(shape, strides)

    def owns(self, tensor: Tensor) -> bool:
        """Decide whether a tensor's memory is a piece of the slab."""
        if self._slab is None:
            return False
        begin = self._slab.data_ptr()
        return begin <= tensor.data_ptr() < begin + self.size

    def close(self) -> None:
        """Free the slab, unless a piece of it is lent."""
        with self._lock:
            self._collect()
            if not self._lent:
                self._slab = None

    def _allocate_slab(self) -> bool:
        try:
            self._slab = self._allocate(self.size)
        except RuntimeError:
            # The system locks no more pages for us (a container's limit): copies become synchronous, and training goes on.
            self._free, self._lent = [], {}
            return False
        return True

    def _take(self, size: int) -> int | None:
        """Take the first free range that is large enough: pieces live shortly, and so leave few holes."""
        self._collect()
        for number, (offset, free_size) in enumerate(self._free):
            if free_size >= size:
                if free_size == size:
                    del self._free[number]
                else:
                    self._free[number] = offset + size, free_size - size
                self._lent[offset] = size
                return offset
        return None

    def _collect(self) -> None:
        """Join the returned pieces to the free ranges."""
        if not self._returned:
            return
        while self._returned:
            offset = self._returned.popleft()
            insort(self._free, (offset, self._lent.pop(offset)))
        joined = [self._free[0]]
        for offset, size in self._free[1:]:
            last_offset, last_size = joined[-1]
            if last_offset + last_size == offset:
                joined[-1] = last_offset, last_size + size
            else:
                joined.append((offset, size))
        self._free = joined

"""A simulated GPU of any capacity on the CPU: tests what a full device and delayed copies do, without a GPU."""

import threading
import weakref
from collections import deque
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowmem_pnn.device.base import Device
from lowmem_pnn.device.transfers import Transfers, in_flight_bytes_of
from lowmem_pnn.memory.pinned import PinnedSlab, slab_bytes_of
from lowmem_pnn.memory.storage_tracker import StorageTracker


class DelayedCopies:
    """A `CopyEngine` that does every copy at the last moment: when somebody waits for it, or for a later one of its direction.

    Until then the target holds nonsense. So whoever uses a tensor without waiting for its copy, or gives memory to somebody else that a
    copy still needs, ends with other numbers, which a comparison with plain copies shows.
    """

    def __init__(self) -> None:
        self._upload_stream, self._download_stream = _DelayedStream(), _DelayedStream()

    def upload(self, host: Tensor, target: Tensor) -> "_DelayedEvent":
        """See `CopyEngine`."""
        return self._upload_stream.add(host, target)

    def download(self, source: Tensor, host: Tensor) -> "_DelayedEvent":
        """See `CopyEngine`."""
        return self._download_stream.add(source, host)


class _HostSlab(PinnedSlab):
    """A slab of ordinary memory, which the device's tracker does not count."""

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Tensor | None:
        with _disable_current_modes():
            return super().lend(shape, dtype, strides)


class _DelayedStream:
    """Copies in order, none before it is waited for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[_MemoryRange, _MemoryRange]] = deque()
        self._num_begun = self.num_done = 0

    def add(self, source: Tensor, target: Tensor) -> "_DelayedEvent":
        assert (source.shape, source.stride(), source.dtype) == (target.shape, target.stride(), target.dtype), "a copy of bytes"
        with self._lock, torch.no_grad():
            target.fill_(float("nan") if target.is_floating_point() else 77)
            self._waiting.append((_MemoryRange(source), _MemoryRange(target)))
            self._num_begun += 1
            return _DelayedEvent(self, self._num_begun)

    def run_until(self, number: int) -> None:
        """Do all copies up to one."""
        with self._lock, torch.no_grad(), _disable_current_modes():
            while self.num_done < number:
                source, target = self._waiting.popleft()
                target.tensor().copy_(source.tensor())
                self.num_done += 1


class _MemoryRange:
    """The memory of a tensor, as a GPU addresses it: without a reference that keeps it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> Tensor:
        storage = self._storage()
        assert storage is not None, "memory was freed while a copy was in flight"
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._layout)


class _DelayedEvent:
    """See `CopyEvent`."""

    def __init__(self, stream: _DelayedStream, number: int) -> None:
        self._stream, self._number = stream, number

    def wait(self) -> None:
        self._stream.run_until(self._number)

    def block_computing(self) -> None:
        # Computing here is done when it is asked for, so that it waits now.
        self._stream.run_until(self._number)

    def is_complete(self) -> bool:
        return self._stream.num_done >= self._number


class SimulatedDevice(Device):
    """A device that counts every tensor that the opening thread makes, and fails like a full GPU above its capacity.

    Uploads and downloads are real copies, so that tensors on the device are counted, and delayed ones; tensors that other threads
    prefetch count as the host's.

    Args:
        budget_bytes: budget that plans are made for.
        capacity_bytes: memory of the device: less than the budget for a device that is fuller than was thought; None for the budget.
    """

    kind = "simulated"

    def __init__(self, budget_bytes: int, capacity_bytes: int | None = None) -> None:
        super().__init__(torch.device("cpu"), budget_bytes)
        self._tracker = StorageTracker(capacity_bytes=capacity_bytes or budget_bytes, fake=False)

    @property
    def capacity_bytes(self) -> int:
        """Memory of the device; may be set, as when another process takes or leaves memory."""
        assert self._tracker.capacity_bytes is not None
        return self._tracker.capacity_bytes

    @capacity_bytes.setter
    def capacity_bytes(self, size: int) -> None:
        self._tracker.capacity_bytes = size

    @staticmethod
    def reserve_for(budget_bytes: int) -> int:
        """Return a thirty-second of the budget, without a minimum: little that is unforeseen happens here."""
        return budget_bytes // 32

    def open(self) -> None:
        """Start counting."""
        self._tracker.__enter__()
        slab = _HostSlab(partial(torch.empty, dtype=torch.uint8), slab_bytes_of(self.budget_bytes))
        self.transfers = Transfers(DelayedCopies(), self.torch_device, in_flight_bytes_of(self.budget_bytes), slab)

    def close(self) -> None:
        """Stop counting."""
        if self.transfers is not None:
            self.transfers.close()
        self._peak = self.peak_bytes
        self._tracker.__exit__(None, None, None)

    def used_bytes(self) -> int:
        """Return the bytes of all live tensors."""
        return self._tracker.live

    def section_peak_bytes(self) -> int:
        """Return the most bytes that were live in this section."""
        return self._tracker.peak

    def synchronize(self) -> None:
        """Do nothing: all is done when a call returns."""

    def begin_section(self) -> None:
        """Begin a section: `section_peak_bytes` starts anew."""
        self._peak = max(self._peak, self.section_peak_bytes())
        self._tracker.reset_peak()

    def release(self) -> None:
        """Do nothing: nothing is cached."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a copy, as from a GPU."""
        return tensor.clone()

"""A pretended GPU of any capacity on the CPU, so that what a full device and late copies do can be tried and tested without one."""

import threading
import weakref
from collections import deque
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowmem_pnn.device.base import Device
from lowmem_pnn.device.transfers import Transfers, window_of
from lowmem_pnn.memory.pinned import PinnedSlab, slab_bytes_of
from lowmem_pnn.memory.storage_tracker import StorageTracker


class LateCopies:
    """A `CopyEngine` that does every copy at the last moment: when somebody waits for it, or for a later one of its direction.

    Until then the target holds nonsense. So whoever uses a tensor without waiting for it, or gives memory to somebody else that a copy
    still needs, ends with other numbers, which a comparison with plain copies shows.
    """

    def __init__(self) -> None:
        self._streams = {"up": _LateStream(), "down": _LateStream()}

    def up(self, host: Tensor, target: Tensor) -> "_LateMark":
        """See `CopyEngine`."""
        return self._streams["up"].add(host, target)

    def down(self, source: Tensor, host: Tensor) -> "_LateMark":
        """See `CopyEngine`."""
        return self._streams["down"].add(source, host)


class _HostSlab(PinnedSlab):
    """A slab of ordinary memory, which the device's tracker does not count."""

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Tensor | None:
        with _disable_current_modes():
            return super().lend(shape, dtype, strides)


class _LateStream:
    """Copies in order, none before it is waited for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[_Memory, _Memory]] = deque()
        self._num_begun = self.num_done = 0

    def add(self, source: Tensor, target: Tensor) -> "_LateMark":
        assert (source.shape, source.stride(), source.dtype) == (target.shape, target.stride(), target.dtype), "a copy of bytes"
        with self._lock, torch.no_grad():
            target.fill_(float("nan") if target.is_floating_point() else 77)
            self._waiting.append((_Memory(source), _Memory(target)))
            self._num_begun += 1
            return _LateMark(self, self._num_begun)

    def do(self, number: int) -> None:
        """All copies up to one."""
        with self._lock, torch.no_grad(), _disable_current_modes():
            while self.num_done < number:
                source, target = self._waiting.popleft()
                target.tensor().copy_(source.tensor())
                self.num_done += 1


class _Memory:
    """A tensor's place, as a GPU knows it: nobody keeps the memory for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._place = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> Tensor:
        storage = self._storage()
        assert storage is not None, "memory was given up while a copy was under way"
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._place)


class _LateMark:
    """See `Mark`."""

    def __init__(self, stream: _LateStream, number: int) -> None:
        self._stream, self._number = stream, number

    def wait(self) -> None:
        self._stream.do(self._number)

    def hold_computing(self) -> None:
        # Computing here is done when it is asked for, so that it waits now.
        self._stream.do(self._number)

    def is_past(self) -> bool:
        return self._stream.num_done >= self._number


class SimulatedDevice(Device):
    """Counts every tensor that the opening thread makes, and fails like a full GPU above the budget.

    Copies to it are real copies, so that what is resident is counted, and late ones; what other threads read ahead is the host's.

    Args:
        budget_bytes: what plans are made for.
        capacity_bytes: what it has: less than the budget for a device that is fuller than was thought; None for the budget.
    """

    kind = "simulated"

    def __init__(self, budget_bytes: int, capacity_bytes: int | None = None) -> None:
        super().__init__(torch.device("cpu"), budget_bytes)
        self._tracker = StorageTracker(capacity_bytes=capacity_bytes or budget_bytes, fake=False)

    @property
    def capacity_bytes(self) -> int:
        """What it has; may be set, as when another process takes or leaves memory."""
        assert self._tracker.capacity_bytes is not None
        return self._tracker.capacity_bytes

    @capacity_bytes.setter
    def capacity_bytes(self, size: int) -> None:
        self._tracker.capacity_bytes = size

    @staticmethod
    def reserve_for(budget_bytes: int) -> int:
        """A thirty-second of the budget: little that is unforeseen happens here."""
        return budget_bytes // 32

    def open(self) -> None:
        """Start counting."""
        self._tracker.__enter__()
        slab = _HostSlab(partial(torch.empty, dtype=torch.uint8), slab_bytes_of(self.budget_bytes))
        self.transfers = Transfers(LateCopies(), self.torch_device, window_of(self.budget_bytes), slab)

    def close(self) -> None:
        """Stop counting."""
        if self.transfers is not None:
            self.transfers.close()
        self._peak = self.peak_bytes
        self._tracker.__exit__(None, None, None)

    def used_bytes(self) -> int:
        """Bytes of all live tensors."""
        return self._tracker.live

    def section_peak_bytes(self) -> int:
        """The most that was live in this section."""
        return self._tracker.peak

    def synchronize(self) -> None:
        """Nothing is left to be done when a call returns."""

    def begin_section(self) -> None:
        """Start a new stretch for `section_peak_bytes`."""
        self._peak = max(self._peak, self.section_peak_bytes())
        self._tracker.reset_peak()

    def release(self) -> None:
        """Nothing is cached."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """An own copy, as from a GPU."""
        return tensor.clone()

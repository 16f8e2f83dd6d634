"""A simulated device that counts what its driver is asked for: copies by what they carry, and calls that wait for all of its work."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.device.transfers import Transfers
from lowmem_pnn.memory.storage_tracker import StorageTracker

# Operations that bring a value to the host.
_DRAINING = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
)


class _Tracker(StorageTracker):
    """Counts values that the host asks of device tensors."""

    counts: Counter[str]

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [
            arg for arg in args if isinstance(arg, Tensor) and arg.dtype != torch.uint8
        ]  # bytes are random states, on the host
        if func in _DRAINING and any(id(tensor.untyped_storage()) in self._known for tensor in tensors):
            self.counts["drains"] += 1
        return super()._call(func, args, kwargs)


class CountingDevice(SimulatedDevice):
    """A simulated device with counts: `ups` and `downs` (copies), `drains` (values asked for at once), `releases` (of cached memory)."""

    def __init__(self, budget_bytes: int) -> None:
        super().__init__(budget_bytes)
        self.counts: Counter[str] = Counter()
        self._tracker = _Tracker(capacity_bytes=budget_bytes, fake=False)
        self._tracker.counts = self.counts

    def open(self) -> None:
        super().open()
        transfers = self.transfers
        assert transfers is not None
        self._count(transfers, "_begin_upload", "ups", lambda tensors, *_: len(tensors))
        self._count(transfers, "download", "downs", lambda *_: 1)

    def _count(self, transfers: Transfers, method: str, name: str, number: Callable[..., int]) -> None:
        call = getattr(transfers, method)

        def counting(*args: Any) -> Any:
            self.counts[name] += number(*args)
            return call(*args)

        setattr(transfers, method, counting)

    def to_host(self, tensor: Tensor) -> Tensor:
        self.counts["drains"] += 1
        return super().to_host(tensor)

    def synchronize(self) -> None:
        self.counts["drains"] += 1

    def release(self) -> None:
        self.counts["releases"] += 1

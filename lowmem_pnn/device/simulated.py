"""A pretended GPU of any capacity on the CPU, so that the handling of a full device can be tried and tested without one."""

import torch
from torch import Tensor

from lowmem_pnn.device.base import Device
from lowmem_pnn.device.tracking import StorageTracker


class SimulatedDevice(Device):
    """Counts every tensor that the opening thread makes, and fails like a full GPU above the budget.

    Copies to it are real copies, so that what is resident is counted; what other threads read ahead is the host's.

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

    def close(self) -> None:
        """Stop counting."""
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

    def place(self, tensor: Tensor) -> Tensor:
        """A counted copy."""
        return tensor.clone()

    def fetch(self, tensor: Tensor) -> Tensor:
        """An own copy, as from a GPU."""
        return tensor.clone()

"""A described GPU: a device to plan for, which is not here."""

from typing import Literal

import torch

from lowmem_pnn.config.gpu_description import GpuDescription
from lowmem_pnn.device.base import Device
from lowmem_pnn.device.context_memory import ASSUMED_BYTES
from lowmem_pnn.device.cuda import CudaDevice
from lowmem_pnn.errors import BudgetError
from lowmem_pnn.units import format_bytes


class DescribedGpu(Device):
    """A GPU as plans see it: its budget, and what a context is taken to hold of it.

    Layers are priced by the kernels of the CPU, as there are no others here. Nothing can run on it.

    Args:
        budget_bytes: memory that the process (or, with scope `allocator`, PyTorch's allocator) may hold.
        gpu: the GPU.
        scope: holder of the memory that the budget bounds.
    """

    kind = "described"

    def __init__(self, budget_bytes: int, gpu: GpuDescription, scope: Literal["process", "allocator"] = "process") -> None:
        super().__init__(torch.device("cpu"), budget_bytes)
        self._gpu, self._scope = gpu, scope

    @staticmethod
    def reserve_for(budget_bytes: int) -> int:
        """See `CudaDevice.reserve_for`."""
        return CudaDevice.reserve_for(budget_bytes)

    @staticmethod
    def slack_for(budget_bytes: int, heap_bytes: int | None = None) -> int:
        """See `CudaDevice.slack_for`."""
        return CudaDevice.slack_for(budget_bytes, heap_bytes)

    @property
    def fixed_bytes(self) -> int:
        """Memory that a context is taken to hold: 0 with scope `allocator`."""
        return ASSUMED_BYTES if self._scope == "process" else 0

    @property
    def context(self) -> dict[str, int | str]:
        """See `Device.context`: what one is taken to hold."""
        return {"bytes": self.fixed_bytes, "found": "described"}

    def open(self) -> None:
        """Check the budget.

        Raises:
            BudgetError: the budget is above the device, or the context above the budget.
        """
        if self.budget_bytes > self._gpu.memory_bytes:
            raise BudgetError(
                f"--max-gpu-mem {format_bytes(self.budget_bytes)} is more than the device has, {format_bytes(self._gpu.memory_bytes)}; "
                "give less"
            )
        if self.fixed_bytes and self.fixed_bytes + self.reserve_bytes >= self.budget_bytes:
            raise BudgetError(
                f"a CUDA context alone is taken to hold {format_bytes(self.fixed_bytes)} on the device, and the budget is "
                f"{format_bytes(self.budget_bytes)}; give more, or --budget-scope allocator to leave the context out"
            )

    def close(self) -> None:
        """Do nothing."""

    def used_bytes(self) -> int:
        """Return 0: nothing is in use."""
        return 0

    def section_peak_bytes(self) -> int:
        """Return 0: nothing was in use."""
        return 0

    def begin_section(self) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def describe(self) -> str:
        """Return what it is, for people."""
        return f"a GPU of {format_bytes(self._gpu.memory_bytes)}, as described"

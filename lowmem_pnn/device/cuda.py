"""An NVIDIA GPU as the training device: the budget bounds all memory of the process there, context and libraries too."""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_pnn.device.base import Device
from lowmem_pnn.device.budget import reserve_bytes_of
from lowmem_pnn.device.context_memory import ContextMemory
from lowmem_pnn.device.cuda_driver import CudaDriver, NvidiaDriver
from lowmem_pnn.device.support import missing_kernels
from lowmem_pnn.device.transfers import Transfers, in_flight_bytes_of
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.memory.pinned import PinnedSlab, slab_bytes_of
from lowmem_pnn.memory.process_meter import ProcessMemoryMeter, private_bytes
from lowmem_pnn.units import MEBIBYTE, format_bytes

# PyTorch's allocator takes memory in segments: 2 MiB for small blocks, 20 MiB for larger ones.
_SEGMENT_BYTES = 22 * MEBIBYTE
# A segment that grows in place does so by pages of that size, and the allocator looks at its cap before it rounds up to them: it ends up to
# one page above.
_PAGE_BYTES = 20 * MEBIBYTE


class CudaDevice(Device):
    """One GPU, with PyTorch's allocator capped at the budget less the memory that the process holds outside the allocator.

    `set_per_process_memory_fraction` alone bounds the allocator, not the process (pytorch#58466): the context and the libraries, some
    300 to 600 MB, are measured first.

    Args:
        budget_bytes: memory that the process (or, with scope `allocator`, PyTorch's allocator) may hold on the device.
        index: number of the device, as torch counts.
        scope: holder of the memory that the budget bounds.
        driver: driver of the machine; None for `NvidiaDriver`.
        max_host_mem: bound on the host's memory, of which the page-locked part takes an eighth at most; None where there is none.
    """

    kind = "cuda"

    def __init__(
        self,
        budget_bytes: int,
        index: int = 0,
        scope: Literal["process", "allocator"] = "process",
        driver: CudaDriver | None = None,
        max_host_mem: int | None = None,
    ) -> None:
        super().__init__(torch.device("cuda", index), budget_bytes)
        self._scope = scope
        self._driver = driver
        self._max_host_mem = max_host_mem
        self._current: AbstractContextManager[Any] | None = None
        # Page-locked memory of transfers that are closed.
        self._pinned = 0
        self._context: ContextMemory | None = None
        # What the allocator holds at the opening: workspaces of the libraries, which stay, and tensors of whoever called us.
        self._held = 0
        self._host_meter = ProcessMemoryMeter(interval=0.02)
        self._host_floor = 0

    @staticmethod
    def reserve_for(budget_bytes: int) -> int:
        """See `Device.reserve_for`: with the page by which the allocator may pass its cap."""
        return reserve_bytes_of(budget_bytes) + _PAGE_BYTES

    @staticmethod
    def slack_for(budget_bytes: int, heap_bytes: int | None = None) -> int:
        """See `Device.slack_for`: blocks that the allocator keeps, and libraries' workspaces of threads that are yet to compute.

        A sixteenth of the budget, at least a segment of small blocks and one of larger ones. Not measured: no GPU has been at hand.
        """
        return max(_SEGMENT_BYTES, budget_bytes // 16)

    def open(self) -> None:
        """Create the context, measure it, and cap the allocator with the rest of the budget.

        Raises:
            ConfigError: there is no such GPU.
            BudgetError: the context alone fills the budget, or the budget above the device, or above what others leave of it.
        """
        if self._driver is None:
            index = self.torch_device.index
            if index >= torch.cuda.device_count():
                raise ConfigError(
                    f"--device cuda:{index}: found {torch.cuda.device_count()} CUDA devices here; give --device cpu"
                )
            if (missing := missing_kernels(index)) is not None:
                raise ConfigError(f"--device cuda:{index}: {missing}")
            self._driver = NvidiaDriver(index)
        driver = self._driver
        self._context = ContextMemory(driver)
        self._context.start()
        self._held = driver.reserved()
        self._check_device(driver, self._context)
        # With scope `allocator` the plan says what is too little, and what would be enough.
        if self._outside and self._outside + self.reserve_bytes >= self.budget_bytes:
            assumed = " (assumed: the driver does not tell)" if self._context.how == "assumed" else ""
            raise BudgetError(
                f"the CUDA context alone holds {format_bytes(self._outside)}{assumed} on the device, and --max-gpu-mem is "
                f"{format_bytes(self.budget_bytes)}; give more, or --budget-scope allocator to leave the context out"
            )
        driver.reset_peak()
        slab = PinnedSlab(driver.pinned, slab_bytes_of(self.budget_bytes, self._max_host_mem))
        self.transfers = Transfers(driver.copies(), self.torch_device, in_flight_bytes_of(self.budget_bytes), slab)
        self._host_meter.start()
        try:
            self._host_floor = private_bytes()
            self._host_meter.begin_section()
            self._cap_allocator(driver)
            # A model's forward may name the device without its number. What the caller had is changed last: a fault before leaves it.
            current = driver.current()
            current.__enter__()
        except BaseException:
            self._host_meter.stop()
            driver.cap_allocator(driver.total())
            raise
        self._current = current

    def _check_device(self, driver: CudaDriver, context: ContextMemory) -> None:
        """Refuse a budget that the device cannot give: it is too small, or other processes hold too much of it."""
        total, used = driver.total(), driver.device_used()
        asked = f"--max-gpu-mem {format_bytes(self.budget_bytes)} is more than the device"
        if self.budget_bytes > total:
            raise BudgetError(f"{asked} has, {format_bytes(total)}; give less")
        others = 0 if used is None else max(0, used - context.size - driver.reserved())
        room = total - others - (context.size - self._outside)
        if self.budget_bytes > room:
            raise BudgetError(
                f"{asked} can give, {format_bytes(room)} of {format_bytes(total)}: other processes hold {format_bytes(others)}; "
                "give less, or end them"
            )

    def _cap_allocator(self, driver: CudaDriver) -> None:
        """Cap the allocator with what the budget leaves it, less the page by which it may pass its cap."""
        driver.cap_allocator(max(0, self.budget_bytes - self._outside - _PAGE_BYTES))

    @property
    def _outside(self) -> int:
        """Bytes that count against the budget and are not the allocator's."""
        return 0 if self._context is None or self._scope == "allocator" else self._context.size

    def close(self) -> None:
        """Lift the cap; the peaks stay readable."""
        assert self._driver is not None, "the device is open"
        assert self.transfers is not None, "the device is open"
        self.transfers.finish()
        self._pinned = max(self._pinned, self.transfers.slab.held_bytes)
        self.transfers.close()
        self._look_again(self._driver, now=True)
        self._peak = self.peak_bytes
        self._host_meter.stop()
        self._driver.empty_cache()
        self._driver.cap_allocator(self._driver.total())
        self._driver.empty_pinned_cache()
        if self._current is not None:
            self._current.__exit__(None, None, None)
            self._current = None

    @property
    def fixed_bytes(self) -> int:
        """Memory in use before training: the context (0 with scope `allocator`), and what the allocator held at the opening."""
        return self._outside + self._held

    @property
    def context(self) -> dict[str, int | str]:
        """See `Device.context`."""
        return {} if self._context is None else {"bytes": self._context.size, "found": self._context.how}

    @property
    def spills(self) -> bool:
        """See `Device.spills`."""
        return self._driver is not None and self._driver.spills()

    @property
    def is_unified(self) -> bool:
        """See `Device.is_unified`."""
        return self._driver is not None and self._driver.is_unified()

    def used_bytes(self) -> int:
        """Return the allocator's reservation and the context, in bytes."""
        assert self._driver is not None, "the device is open"
        return self._outside + self._driver.reserved()

    def section_peak_bytes(self) -> int:
        """Return the allocator's highest reservation of the section, and the context, in bytes."""
        assert self._driver is not None, "the device is open"
        return self._outside + self._driver.peak_reserved()

    def synchronize(self) -> None:
        """Wait for the device's streams."""
        torch.cuda.synchronize(self.torch_device)

    def begin_section(self) -> None:
        """Begin a section: `section_peak_bytes` starts anew."""
        assert self._driver is not None, "the device is open"
        self._look_again(self._driver)
        self._peak = max(self._peak, self.section_peak_bytes())
        self._driver.reset_peak()

    def _look_again(self, driver: CudaDriver, *, now: bool = False) -> None:
        """Take from the allocator what the context holds more than before, of what it keeps for nobody where that is too much."""
        if self._scope == "allocator" or self._context is None:
            return
        before = self._outside
        self._context.look_again(now=now)
        if self._outside > before:
            self._cap_allocator(driver)
            if self.used_bytes() > self.budget_bytes:
                driver.empty_cache()

    @property
    def host_peak_bytes(self) -> int:
        """The highest private host memory above the amount in use when the device was opened, and the page-locked memory.

        Page-locked memory is mapped by the driver, and not every system counts it as private memory: it is added, counted or not.
        """
        pinned = self._pinned if self.transfers is None else max(self._pinned, self.transfers.slab.held_bytes)
        return max(0, self._host_meter.peak() - self._host_floor) + pinned

    def release(self) -> None:
        """Give cached blocks back to the driver."""
        assert self._driver is not None, "the device is open"
        self._driver.empty_cache()

    def random_state(self) -> tuple[Tensor, ...]:
        """Return the states of the host's generator and the GPU's."""
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.torch_device)

    def set_random_state(self, state: tuple[Tensor, ...]) -> None:
        """Restore both states."""
        torch.set_rng_state(state[0])
        torch.cuda.set_rng_state(state[1], self.torch_device)

    def describe(self) -> str:
        """Return the GPU's name, for people."""
        return torch.cuda.get_device_name(self.torch_device)

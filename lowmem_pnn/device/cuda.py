"""An NVIDIA GPU as the training device: the budget bounds all memory of the process there, context and libraries too."""

import contextlib
import os
from typing import Literal, Protocol

import torch
from torch import Tensor

from lowmem_pnn.device.base import Device
from lowmem_pnn.device.cpu import warm_up
from lowmem_pnn.device.transfers import CopyEngine, Transfers, in_flight_bytes_of
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.memory.pinned import PinnedSlab, slab_bytes_of
from lowmem_pnn.memory.process_meter import ProcessMemoryMeter, private_bytes
from lowmem_pnn.units import format_bytes


class CudaDriver(Protocol):
    """The queries and settings that `CudaDevice` needs of the machine; a test answers them without a GPU."""

    def start(self) -> None:
        """Create the context and load the libraries that training uses."""

    def device_used(self) -> int:
        """Return the bytes in use on the device, by all processes."""

    def process_used(self) -> int | None:
        """Return the bytes that this process holds on the device; None where the driver does not know the process."""

    def total(self) -> int:
        """Return the device's memory in bytes."""

    def reserved(self) -> int:
        """Return the bytes that PyTorch's allocator holds."""

    def peak_reserved(self) -> int:
        """Return the most bytes that the allocator held since `reset_peak`."""

    def reset_peak(self) -> None:
        """Start `peak_reserved` anew."""

    def cap_allocator(self, size: int) -> None:
        """Make the allocator fail above this many bytes."""

    def empty_cache(self) -> None:
        """Give cached blocks back to the driver."""

    def pinned(self, size: int) -> Tensor:
        """Make a tensor of page-locked host memory, uint8, of so many bytes."""

    def copies(self) -> CopyEngine:
        """Make the engine that copies between host and device beside the computing."""


class NvidiaDriver:
    """`CudaDriver` through torch.cuda and NVML.

    Args:
        index: number of the device, as torch counts.
    """

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._nvml_handle = None
        # NVML is optional: absent on Jetson, without process information in many containers.
        with contextlib.suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            uuid = "GPU-" + str(torch.cuda.get_device_properties(index).uuid)
            self._nvml_handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    def start(self) -> None:
        """Create the context with a tiny training step, then empty the allocator."""
        torch.cuda.init()
        with torch.cuda.device(self._device):
            warm_up(self._device)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def device_used(self) -> int:
        """Return the bytes in use on the device: NVML's figure, else the part that cudaMemGetInfo does not call free."""
        if self._nvml_handle is not None:
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):
                return int(pynvml.nvmlDeviceGetMemoryInfo(self._nvml_handle).used)
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def process_used(self) -> int | None:
        """Return the bytes of this process in NVML's list, if it is there."""
        if self._nvml_handle is None:
            return None
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._nvml_handle):
                if process.pid == os.getpid() and process.usedGpuMemory is not None:
                    return int(process.usedGpuMemory)
        return None

    def total(self) -> int:
        """Return the device's memory in bytes."""
        return int(torch.cuda.get_device_properties(self._device).total_memory)

    def reserved(self) -> int:
        """Return the bytes that PyTorch's allocator holds."""
        return torch.cuda.memory_reserved(self._device)

    def peak_reserved(self) -> int:
        """Return the allocator's highest reservation since `reset_peak`, in bytes."""
        return torch.cuda.max_memory_reserved(self._device)

    def reset_peak(self) -> None:
        """Start `peak_reserved` anew."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def cap_allocator(self, size: int) -> None:
        """Make the allocator fail above this many bytes."""
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / self.total()), self._device)

    def empty_cache(self) -> None:
        """Give cached blocks back to the driver."""
        torch.cuda.empty_cache()

    def pinned(self, size: int) -> Tensor:
        """Make a tensor of so many bytes by PyTorch's allocator of page-locked memory."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copies(self) -> CopyEngine:
        """Make the copy streams of this device."""
        return CudaCopies(self._device)


class CudaCopies:
    """`CopyEngine` by two streams of a GPU, beside the current one, which computes.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._upload_stream, self._download_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def upload(self, host: Tensor, target: Tensor) -> "CudaCopyEvent":
        """See `CopyEngine`."""
        return self._copy(self._upload_stream, host, target)

    def download(self, source: Tensor, host: Tensor) -> "CudaCopyEvent":
        """See `CopyEngine`."""
        return self._copy(self._download_stream, source, host)

    def _copy(self, stream: torch.cuda.Stream, source: Tensor, target: Tensor) -> "CudaCopyEvent":
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), torch.no_grad():
            target.copy_(source, non_blocking=True)
        return CudaCopyEvent(stream.record_event(), self._device)


class CudaCopyEvent:
    """`CopyEvent` by a CUDA event.

    Args:
        event: recorded event.
        device: GPU of the event.
    """

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        """See `CopyEvent`."""
        self._event.synchronize()

    def block_computing(self) -> None:
        """See `CopyEvent`."""
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def is_complete(self) -> bool:
        """See `CopyEvent`."""
        return bool(self._event.query())


class CudaDevice(Device):
    """One GPU, with PyTorch's allocator capped at the budget less the memory that the process holds outside the allocator.

    `set_per_process_memory_fraction` alone bounds the allocator, not the process (pytorch#58466): the context and the libraries, some
    300 to 600 MB, are measured first.

    Args:
        budget_bytes: memory that the process (or, with scope `allocator`, PyTorch's allocator) may hold on the device.
        index: number of the device, as torch counts.
        scope: holder of the memory that the budget bounds.
        driver: driver of the machine; None for `NvidiaDriver`.
    """

    kind = "cuda"

    def __init__(
        self,
        budget_bytes: int,
        index: int = 0,
        scope: Literal["process", "allocator"] = "process",
        driver: CudaDriver | None = None,
    ) -> None:
        super().__init__(torch.device("cuda", index), budget_bytes)
        self._scope = scope
        self._driver = driver
        # Bytes that the process holds on the device outside PyTorch's allocator: context, kernels, libraries.
        self._outside = 0
        self._host_meter = ProcessMemoryMeter(interval=0.02)
        self._host_floor = 0

    def open(self) -> None:
        """Create the context, measure it, and cap the allocator with the rest of the budget.

        Raises:
            ConfigError: there is no such GPU.
            BudgetError: the context alone is above the budget, or the budget above the device.
        """
        if self._driver is None:
            index = self.torch_device.index
            if index >= torch.cuda.device_count():
                raise ConfigError(
                    f"--device cuda:{index}: found {torch.cuda.device_count()} CUDA devices here; give --device cpu"
                )
            self._driver = NvidiaDriver(index)
        driver = self._driver
        before = driver.device_used()
        driver.start()
        if self._scope == "process":
            process = driver.process_used()
            held = process if process is not None else driver.device_used() - before
            self._outside = max(0, held - driver.reserved())
        if self.budget_bytes > driver.total():
            raise BudgetError(
                f"--max-gpu-mem {format_bytes(self.budget_bytes)} is more than the device has, {format_bytes(driver.total())}; give less"
            )
        if self._outside + self.reserve_bytes >= self.budget_bytes:
            raise BudgetError(
                f"the CUDA context alone holds {format_bytes(self._outside)} on the device, and --max-gpu-mem is "
                f"{format_bytes(self.budget_bytes)}; give more, or --budget-scope allocator to leave the context out"
            )
        driver.cap_allocator(self.budget_bytes - self._outside)
        driver.reset_peak()
        slab = PinnedSlab(driver.pinned, slab_bytes_of(self.budget_bytes))
        self.transfers = Transfers(driver.copies(), self.torch_device, in_flight_bytes_of(self.budget_bytes), slab)
        self._host_meter.start()
        self._host_floor = private_bytes()
        self._host_meter.begin_section()

    def close(self) -> None:
        """Lift the cap; the peaks stay readable."""
        assert self._driver is not None, "the device is open"
        assert self.transfers is not None, "the device is open"
        self.transfers.finish()
        self._measure_outside(self._driver)
        self._peak = self.peak_bytes
        self._host_meter.stop()
        self._driver.empty_cache()
        self._driver.cap_allocator(self._driver.total())

    @property
    def fixed_bytes(self) -> int:
        """Memory that the process holds on the device outside PyTorch's allocator: 0 with scope `allocator`."""
        return self._outside

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
        self._measure_outside(self._driver)
        self._peak = max(self._peak, self.section_peak_bytes())
        self._driver.reset_peak()

    def _measure_outside(self, driver: CudaDriver) -> None:
        """Measure again the memory outside the allocator: kernels and libraries are loaded at their first use.

        Only where the driver knows the process: the memory in use on the device may be another process's.
        """
        process = driver.process_used() if self._scope == "process" else None
        if process is not None and (outside := process - driver.reserved()) > self._outside:
            self._outside = outside
            driver.cap_allocator(max(0, self.budget_bytes - outside))

    @property
    def host_peak_bytes(self) -> int:
        """The highest private host memory above the amount in use when the device was opened, and the page-locked memory.

        Page-locked memory is mapped by the driver, and not every system counts it as private memory: it is added, counted or not.
        """
        pinned = 0 if self.transfers is None else self.transfers.slab.held_bytes
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

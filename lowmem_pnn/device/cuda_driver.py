"""The CUDA driver: queries and settings that the budget of a GPU needs of the machine, through torch.cuda and NVML."""

import contextlib
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from lowmem_pnn.device.budget import is_out_of_memory
from lowmem_pnn.device.cpu import warm_up
from lowmem_pnn.device.transfers import CopyEngine
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.memory.nvml import Nvml

# Names under which PyTorch reads its allocator's settings: an earlier one goes before a later one.
_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_EXPANDS = "expandable_segments"
_WSL = Path("/dev/dxg")


class CudaDriver(Protocol):
    """The queries and settings that `CudaDevice` needs of the machine; a test answers them without a GPU."""

    def identity(self) -> str:
        """Return a name of the device that stays the same in this process."""

    def has_context(self) -> bool:
        """Decide whether this process has a context on the device already, from earlier work."""

    def start(self) -> None:
        """Create the context and load the libraries that training uses."""

    def device_used(self) -> int | None:
        """Return the bytes in use on the device, by all processes; None where asking would make a context."""

    def processes(self) -> dict[int, int | None] | None:
        """Return the bytes of each process on the device, by id, as `Nvml.processes` does; None without such a list."""

    def total(self) -> int:
        """Return the device's memory in bytes."""

    def is_unified(self) -> bool:
        """Decide whether the device has no memory of its own, but takes the host's."""

    def spills(self) -> bool:
        """Decide whether memory is moved to the host where the device is full, instead of an allocation failing."""

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

    def current(self) -> AbstractContextManager[Any]:
        """Return a context in which this is the current device of the thread that enters it."""

    def empty_pinned_cache(self) -> None:
        """Give page-locked memory that is free back to the system."""


class NvidiaDriver:
    """`CudaDriver` through torch.cuda and NVML.

    Args:
        index: number of the device, as torch counts.
    """

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._nvml = Nvml.find(index)

    def identity(self) -> str:
        """See `CudaDriver`."""
        return f"{os.getpid()}/{torch.cuda.get_device_properties(self._device).uuid}"

    def has_context(self) -> bool:
        """See `CudaDriver`; where torch cannot tell, whether it has been used."""
        if not torch.cuda.is_initialized():
            return False
        asks = getattr(torch._C, "_cuda_hasPrimaryContext", None)
        return True if asks is None else bool(asks(self._device.index))

    def start(self) -> None:
        """Create the context with a tiny training step, then empty the allocator.

        Raises:
            ConfigError: the step fails.
        """
        torch.cuda.init()
        expands = not self.is_unified() and use_expandable_segments()
        reason = self._warm_up()
        if reason is not None and expands and leave_expandable_segments():
            # Virtual GPUs, and some in WSL, cannot map memory so. Their drivers say that an operation is not supported, or nothing.
            reason = self._warm_up()
        if reason is not None:
            raise ConfigError(f"--device {self._device}: a first step of training fails there: {reason}; give --device cpu")

    def _warm_up(self) -> str | None:
        """Train a tiny model, and empty the allocator; return what went wrong, unless memory ran out."""
        try:
            with torch.cuda.device(self._device):
                warm_up(self._device)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return " ".join(str(error).split())[:200]
        return None

    def device_used(self) -> int | None:
        """See `CudaDriver`: NVML's figure, else the part that cudaMemGetInfo does not call free; of unified memory what is not available."""
        if self.is_unified():
            # Pages of files count as free there: they go when they are needed, which cudaMemGetInfo does not know.
            return max(0, self.total() - int(psutil.virtual_memory().available))
        if self._nvml is not None and (used := self._nvml.used_bytes()) is not None:
            return used
        if not self.has_context():
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def processes(self) -> dict[int, int | None] | None:
        """See `CudaDriver`."""
        return None if self._nvml is None else self._nvml.processes()

    def total(self) -> int:
        """Return the device's memory in bytes."""
        return int(torch.cuda.get_device_properties(self._device).total_memory)

    def is_unified(self) -> bool:
        """See `CudaDriver`: Jetson, GB10."""
        return bool(torch.cuda.get_device_properties(self._device).is_integrated)

    def spills(self) -> bool:
        """See `CudaDriver`: Windows and WSL by their drivers' default, unified memory by the host's swap."""
        return sys.platform == "win32" or _WSL.exists() or self.is_unified()

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

    def current(self) -> AbstractContextManager[Any]:
        """See `CudaDriver`."""
        return torch.cuda.device(self._device)

    def empty_pinned_cache(self) -> None:
        """See `CudaDriver`; PyTorch keeps it else, in sizes that the next run may not ask for."""
        if (empty := getattr(torch._C, "_host_emptyCache", None)) is not None:
            empty()


def use_expandable_segments() -> bool:
    """Have PyTorch's allocator grow segments in place, so that freed blocks of other sizes leave fewer holes; not where the user has chosen.

    Returns:
        Whether it was asked for.
    """
    return sys.platform.startswith("linux") and _EXPANDS not in _allocator_settings() and _set_expandable_segments("True")


def leave_expandable_segments() -> bool:
    """Have PyTorch's allocator no longer grow segments in place.

    Returns:
        Whether it was asked for.
    """
    return _set_expandable_segments("False")


def _set_expandable_segments(wanted: str) -> bool:
    """Change this one setting of the allocator: what is not in the text that it is given goes back to its default."""
    others = [one for one in _allocator_settings().split(",") if one.strip() and _EXPANDS not in one]
    for place, name in ((torch._C, "_accelerator_setAllocatorSettings"), (torch.cuda.memory, "_set_allocator_settings")):
        if (change := getattr(place, name, None)) is not None:
            with contextlib.suppress(RuntimeError):  # a build without them
                change(",".join([*others, f"{_EXPANDS}:{wanted}"]))
                return True
    return False


def _allocator_settings() -> str:
    """Return the allocator's settings, as they were given last: by the environment, or since then."""
    if (ask := getattr(torch._C, "_accelerator_getAllocatorSettings", None)) is not None and (given := ask()):
        return str(given)
    return next((given for name in _SETTINGS if (given := os.environ.get(name))), "")


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

    Any thread may ask it, and threads begin with device 0 as their current one, on which asking would make a context.

    Args:
        event: recorded event.
        device: GPU of the event.
    """

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        """See `CopyEvent`."""
        with torch.cuda.device(self._device):
            self._event.synchronize()

    def block_computing(self) -> None:
        """See `CopyEvent`."""
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def is_complete(self) -> bool:
        """See `CopyEvent`."""
        with torch.cuda.device(self._device):
            return bool(self._event.query())

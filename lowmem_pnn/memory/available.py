"""Available memory: how much of a device is free now, and a share of it as a budget. torch is imported only where there may be a GPU."""

import re
from pathlib import Path
from typing import Any

import psutil

from lowmem_pnn.config.gpu_description import GpuDescription
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.memory.cgroup import bytes_left
from lowmem_pnn.memory.nvml import Nvml
from lowmem_pnn.memory.process_meter import private_bytes
from lowmem_pnn.units import MEGABYTE, format_bytes

AUTO_SHARE = 0.8
"""Share of the available memory that `auto` takes."""

FLOOR_BYTES = 500 * MEGABYTE
"""Private memory of a process that has imported what it trains with: 430 to 460 MB, measured."""

_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*", re.ASCII)
DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg")
"""Files of NVIDIA's drivers, of which one is there where a driver is."""
_GPU = re.compile(r"cuda(:\d+)?", re.ASCII)


def is_share(value: Any) -> bool:
    """Return whether a budget is a share of the available memory: `auto`, or a number with a percent sign.

    Example:
        >>> is_share("auto"), is_share("75%"), is_share("2GB"), is_share(10**9)
        (True, True, False, False)
    """
    return isinstance(value, str) and (value.strip().lower() == "auto" or _SHARE.fullmatch(value) is not None)


def budget_of(value: Any, device: str = "cpu", free_bytes: int | None = None) -> Any:
    """Return a budget in bytes where it was given as a share of what is free for it now; anything else as it was given.

    Args:
        value: a size, `auto`, or a share such as `75%`.
        device: the training device, as for `available_bytes`.
        free_bytes: what is available there, where that is known; None to ask.

    Raises:
        ConfigError: the share is 0 or above 100 %, or no such device is there.
        BudgetError: nothing is free beside what the process takes itself.
    """
    if not is_share(value):
        return value
    match = _SHARE.fullmatch(value)
    share = float(match[1]) / 100 if match else AUTO_SHARE
    if not 0 < share <= 1:
        raise ConfigError(f"--max-gpu-mem {value} is no share of what is available; write 75%, or auto for {AUTO_SHARE:.0%}")
    if free_bytes is None:
        free_bytes = bytes_for_budget(device)
        if not free_bytes:
            raise BudgetError(
                f"--max-gpu-mem {value}: {format_bytes(available_bytes(device))} are free, and PyTorch itself takes "
                f"{format_bytes(FLOOR_BYTES)} beside the budget; free some memory"
            )
    return int(share * free_bytes)


def budget_on_described(gpu: GpuDescription, device: str, value: Any) -> Any:
    """Return a budget on a GPU that is not here: a share of it in bytes, and all of it where none is asked for.

    Args:
        gpu: the GPU.
        device: the training device, as the option names it.
        value: as for `budget_of`; None where none is asked for.

    Raises:
        ConfigError: the device is the CPU, or the share is 0 or above 100 %.

    Example:
        >>> budget_on_described(GpuDescription.parse("8GB"), "auto", "75%")
        6000000000
    """
    gpu.check_device(device)
    return gpu.memory_bytes if value is None else budget_of(value, free_bytes=gpu.memory_bytes)


def may_be_gpu(device: str) -> bool:
    """Decide, without torch, whether a training device may be a GPU here: `auto` where there is a driver.

    Args:
        device: the training device, as the option names it.
    """
    return _GPU.fullmatch(device) is not None or (device == "auto" and any(Path(driver).exists() for driver in DRIVERS))


def available_bytes(device: str = "cpu") -> int:
    """Return the bytes that are free on a device: on a GPU what its driver says, on the CPU what can be had without swapping.

    Args:
        device: the training device that is taken: `cpu`, or `cuda` with its index.

    Raises:
        ConfigError: a GPU is asked for that is not there.
    """
    if _GPU.fullmatch(device) is None:
        return _host_bytes()
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch finds no GPU; give --device cpu, or auto")
    index = _index_of(device)
    if index >= torch.cuda.device_count():
        raise ConfigError(f"--device {device}: found {torch.cuda.device_count()} CUDA devices here; give --device cpu")
    if _is_integrated(device):
        return _host_bytes()
    # By NVML where it answers: cudaMemGetInfo makes a context, which could then no longer be measured.
    nvml = Nvml.find(index)
    free = None if nvml is None else nvml.free_bytes()
    return int(torch.cuda.mem_get_info(index)[0]) if free is None else free


def bytes_for_budget(device: str = "cpu") -> int:
    """Return the bytes that a budget may take of a device: on the CPU without those that the process will hold beside it, as its floor.

    Args:
        device: as for `available_bytes`.

    Raises:
        ConfigError: as there.
    """
    free = available_bytes(device)
    if _GPU.fullmatch(device) is not None and not _is_integrated(device):
        return free
    return max(0, free - max(0, FLOOR_BYTES - private_bytes()))


def _is_integrated(device: str) -> bool:
    import torch

    return bool(torch.cuda.get_device_properties(_index_of(device)).is_integrated)


def _index_of(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _host_bytes() -> int:
    return min(int(psutil.virtual_memory().available), bytes_left())

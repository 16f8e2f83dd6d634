"""Support of GPUs: which of them this build of PyTorch has kernels for, and why one that is there is not taken."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lowmem_pnn.memory.available import DRIVERS, budget_of, is_share

_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)[a-z]?")
_OLDER_WHEEL = "pip install torch torchvision --index-url https://download.pytorch.org/whl/cu126"


def has_kernels(capability: tuple[int, int], architectures: Iterable[str]) -> bool:
    """Decide whether a build of PyTorch has kernels for a GPU.

    Binary kernels run on GPUs of the same major compute capability, and of no lower minor one; the intermediate code of `compute_*` is
    compiled for later ones (CUDA C++ Programming Guide, "Binary compatibility" and "PTX compatibility").

    Args:
        capability: compute capability of the GPU, major and minor.
        architectures: what the build is for, as `torch.cuda.get_arch_list` names it.

    Example:
        >>> built = ["sm_75", "sm_80", "sm_86", "compute_90"]
        >>> [has_kernels(one, built) for one in ((6, 1), (7, 5), (8, 9), (12, 0))]
        [False, True, True, True]
    """
    for match in filter(None, map(_ARCHITECTURE.fullmatch, architectures)):
        major, minor = int(match[2]), int(match[3])
        if match[1] == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if match[1] == "compute" and (major, minor) <= capability:
            return True
    return False


def missing_kernels(index: int) -> str | None:
    """Say that this build of PyTorch has no kernels for a GPU, and what to do; None where it has.

    Args:
        index: number of the device, as torch counts.
    """
    if torch.version.hip is not None:
        return None  # whose architectures have other names
    capability, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if not built or has_kernels(capability, built):
        return None
    numbers = ", ".join(f"{match[2]}.{match[3]}" for match in filter(None, map(_ARCHITECTURE.fullmatch, built)))
    older = f"; {_OLDER_WHEEL}" if capability < (7, 5) else "; pip install -U torch torchvision"
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, and torch {torch.__version__} is built "
        f"for {numbers}{older}"
    )


def is_gpu(device: str) -> bool:
    """Decide whether a training device is a GPU here: `auto` is where there is one that this build of PyTorch has kernels for.

    Args:
        device: the device, as the option names it.
    """
    kind = device.partition(":")[0]
    return kind == "cuda" or (kind == "auto" and torch.cuda.is_available() and missing_kernels(0) is None)


def device_taken(device: str, local: int = 0) -> str:
    """Return the device that a run takes: `cpu`, or `cuda` with an index.

    Args:
        device: the device, as the option names it.
        local: number of the process on its machine, which is its GPU's where the option has none.
    """
    return f"cuda:{device.partition(':')[2] or local}" if is_gpu(device) else "cpu"


def budget_on(device: str, value: Any, local: int = 0) -> Any:
    """Return a budget in bytes where it was given as a share of what is available on a device that a run takes; see `budget_of`.

    Args:
        device: the device, as the option names it.
        value: a size, `auto`, or a share such as `75%`.
        local: as for `device_taken`.
    """
    return budget_of(value, device_taken(str(device), local)) if is_share(value) else value


def why_no_gpu() -> str:
    """Say why torch finds no GPU here."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm, and finds none"
    if torch.version.cuda is None:
        return "this torch is built for the CPU alone; a build for CUDA: https://pytorch.org/get-started/locally"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all of them"
    if not has_driver():
        return "there is no NVIDIA driver"
    known = _driver_cuda()
    if known is not None and known[0] < int(torch.version.cuda.partition(".")[0]):
        return (
            f"the driver knows CUDA {known[0]}.{known[1]}, and torch {torch.__version__} is built for CUDA {torch.version.cuda}; update the "
            f"driver, or {_OLDER_WHEEL}"
        )
    try:
        torch.cuda.init()
    except Exception as error:  # whatever the driver says
        return " ".join(str(error).split())[:200]
    return "torch does not find one"


def has_driver() -> bool:
    """Decide whether there is an NVIDIA driver."""
    return any(Path(path).exists() for path in DRIVERS)


def _driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver knows; None where it does not tell."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = int(pynvml.nvmlSystemGetCudaDriverVersion())
    except Exception:  # NVML is optional everywhere, and raises errors of its own
        return None
    return version // 1000, version % 1000 // 10

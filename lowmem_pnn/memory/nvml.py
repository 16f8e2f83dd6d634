"""NVML: what the NVIDIA driver says of a GPU's memory and of the processes on it, without a CUDA context of our own."""

from __future__ import annotations

import contextlib
import os
from typing import Any

# A handle whose memory differs by more than this share from what CUDA sees is that of another device: of the GPU around a MIG instance.
_TOLERANCE = 0.1


class Nvml:
    """One device, or one MIG instance, as NVML knows it.

    Args:
        module: the module `pynvml`, initialised.
        handle: NVML's handle of the device.
    """

    def __init__(self, module: Any, handle: Any) -> None:
        self._module, self._handle = module, handle

    @classmethod
    def find(cls, index: int) -> Nvml | None:
        """Find a device.

        NVML is optional: absent on Jetson, refused in some containers; and a MIG instance is found only by a name of its own.

        Args:
            index: number of the device, as torch counts.

        Returns:
            The device; None where NVML does not know it.
        """
        with contextlib.suppress(Exception):  # NVML and torch raise errors of many types where there is no driver
            import pynvml
            import torch

            pynvml.nvmlInit()
            properties = torch.cuda.get_device_properties(index)
            for name in _names(index, str(properties.uuid)):
                with contextlib.suppress(pynvml.NVMLError):
                    handle = pynvml.nvmlDeviceGetHandleByUUID(name)
                    total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
                    if abs(total - properties.total_memory) <= _TOLERANCE * total:
                        return cls(pynvml, handle)
        return None

    def used_bytes(self) -> int | None:
        """Return the bytes in use on the device, by all processes; None where NVML does not say.

        Newer drivers tell them apart from what they reserve for themselves, which is no part of the memory that CUDA sees.
        """
        newer = getattr(self._module, "nvmlMemory_v2", None)
        for version in ((newer,), ()) if newer is not None else ((),):
            with contextlib.suppress(self._module.NVMLError):
                return int(self._module.nvmlDeviceGetMemoryInfo(self._handle, *version).used)
        return None

    def free_bytes(self) -> int | None:
        """Return the bytes that nobody uses; None where NVML does not say."""
        with contextlib.suppress(self._module.NVMLError):
            return int(self._module.nvmlDeviceGetMemoryInfo(self._handle).free)
        return None

    def processes(self) -> dict[int, int | None] | None:
        """Return the bytes of each process that computes on the device, by its id.

        The ids may be those of the host, and not of this container. The bytes may be None, or 0, where the driver does not tell.

        Returns:
            The processes; None where NVML has no list of them.
        """
        with contextlib.suppress(self._module.NVMLError):
            listed = self._module.nvmlDeviceGetComputeRunningProcesses(self._handle)
            return {int(one.pid): None if one.usedGpuMemory is None else int(one.usedGpuMemory) for one in listed}
        return None


def _names(index: int, uuid: str) -> list[str]:
    """Return the names that a device may have in NVML: a MIG instance's own first."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    asked = visible[index].strip() if index < len(visible) else ""
    return [*([asked] if asked.startswith("MIG-") else []), f"MIG-{uuid}", f"GPU-{uuid}"]

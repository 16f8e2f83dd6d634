"""Benchmark of a machine apart from the model: the optimizer's step, the drive, and the device's memory."""

import math
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from lowmem_pnn.device import Device
from lowmem_pnn.errors import DiskError
from lowmem_pnn.memory.aligned import aligned_empty
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling.layer_runner import timed
from lowmem_pnn.stores.tensor_file import TensorFile

# Most parameters that are stepped, bytes that are copied or written, and bytes that go through memory.
_STEPPED, _MOVED, _TOUCHED = 1_000_000, 16_000_000, 8_000_000
_REPEATS = 3
# Sizes of square matrices whose product keeps a core, or a GPU, busy.
_PRODUCT_OF_HOST, _PRODUCT_OF_GPU = 256, 2048
_FLOAT_BYTES = 4


def time_machine(device: Device, optimizer: OptimizerSpec, folder: Path, room: int) -> tuple[float, float, float, float]:
    """Measure the timings that do not depend on the model.

    Args:
        device: Device, open.
        optimizer: Optimizer whose step is timed.
        folder: Folder on the drive that runs use; files written there are deleted.
        room: Bytes that may be in use on the device.

    Returns:
        Seconds of the optimizer's step per parameter; seconds per byte read from the drive, written to the drive, and through the
        device's memory.
    """
    read, write = time_drive(folder, max(1, min(_MOVED, room // 4)))
    if not device.shares_host:
        # Bytes between drive and device go through the host.
        up, down = _time_copies(device, room)
        read, write = read + up, write + down
    return _time_step(device, optimizer, room), read, write, _time_memory(device, room)


def time_product(device: Device, room: int) -> float:
    """Measure the seconds of a multiply-accumulate in a product of two square matrices.

    Args:
        device: Device, open.
        room: Bytes that may be in use on the device.
    """
    size = min(_PRODUCT_OF_HOST if device.shares_host else _PRODUCT_OF_GPU, math.isqrt(max(1, room // (4 * _FLOAT_BYTES))))
    one, other = (torch.ones(size, size, device=device.torch_device) for _ in range(2))
    return min(timed(device, lambda: torch.mm(one, other)) for _ in range(_REPEATS)) / size**3


def _time_step(device: Device, optimizer: OptimizerSpec, room: int) -> float:
    """Return the seconds of the optimizer's step per parameter."""
    count = max(1, min(_STEPPED, room // (2 * _FLOAT_BYTES * (2 + len(optimizer.state_names)))))
    parameter = nn.Parameter(torch.zeros(count, device=device.torch_device))
    parameter.grad = torch.full_like(parameter, 1e-3)
    layout = optimizer.layout(parameter).items()
    state = {name: torch.zeros(shape, dtype=dtype, device=device.torch_device) for name, (dtype, shape) in layout}
    stepper = optimizer.build({"p": parameter}, {"p": state})
    return min(timed(device, stepper.step) for _ in range(_REPEATS)) / count


def _time_memory(device: Device, room: int) -> float:
    """Return the seconds per byte that is read from or written to the device's memory."""
    source = torch.zeros(max(1, min(_TOUCHED, room // 4) // _FLOAT_BYTES), device=device.torch_device)
    target = torch.zeros_like(source)
    return min(timed(device, lambda: target.copy_(source)) for _ in range(_REPEATS)) / (2 * source.nbytes)


def _time_copies(device: Device, room: int) -> tuple[float, float]:
    """Return the seconds per byte copied to the device, and back."""
    host = torch.zeros(max(1, min(_MOVED, room // 4) // _FLOAT_BYTES))
    on_device = device.to_device(host)
    up = min(timed(device, lambda: device.to_device(host)) for _ in range(_REPEATS))
    down = min(timed(device, lambda: device.to_host(on_device)) for _ in range(_REPEATS))
    return up / host.nbytes, down / host.nbytes


def time_drive(folder: Path, nbytes: int) -> tuple[float, float]:
    """Return the seconds per byte read and written as weight files are: in place, not synced.

    Args:
        folder: Folder on the drive; files written there are deleted.
        nbytes: Bytes that are written and read.
    """
    tensor = aligned_empty((nbytes,), torch.uint8).fill_(1)
    for parent in (folder, None):
        with suppress(OSError, DiskError), tempfile.TemporaryDirectory(prefix=".lowmem-pnn-", dir=parent) as name:
            with TensorFile.create(Path(name) / "rate", {"x": (torch.uint8, (nbytes,))}) as file:
                writes = [_seconds(lambda: file.write_from("x", tensor)) for _ in range(_REPEATS)]
                reads = [_seconds(lambda: file.read_into("x", tensor)) for _ in range(_REPEATS)]
            return min(reads) / nbytes, min(writes) / nbytes
    return 0.0, 0.0  # nothing can be written anywhere: a run will say so


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

"""Opening: the device and the workload on it, ready for a plan; and what has to be there before the floor is taken."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.options import check_device
from lowmem_pnn.device import CpuDevice, CudaDevice, Device
from lowmem_pnn.model.chain import TensorSpec, capture
from lowmem_pnn.optim.low_precision import prepare_levels
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling.profiler import profile
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.run.ranks import ALONE, Rank
from lowmem_pnn.training.inputs import Inputs
from lowmem_pnn.workload import Workload, make_workload, with_compiled_layers


@contextmanager
def open_workload(
    config: FitConfig, inputs: Inputs, rank: Rank = ALONE, display: Display | None = None
) -> Iterator[tuple[Device, Workload]]:
    """The device, open, and what is to be done on it.

    Code is compiled before the floor is taken: the compiler is no part of training, and when it runs nothing of the model is there.
    """
    _prepare_optimizer(config)
    device = _open_device(config, rank)
    compiled = None
    if config.compile:
        if display is not None:
            display.message("compiling layers")
        compiled = with_compiled_layers(make_workload(config, *inputs, device.torch_device), device.torch_device)
    with device:
        yield device, compiled or make_workload(config, *inputs, device.torch_device)


def _open_device(config: FitConfig, rank: Rank = ALONE) -> Device:
    kind, _, index = config.device.partition(":")
    if kind == "cuda" or (kind == "auto" and torch.cuda.is_available()):
        check_device(config, on_cpu=False, memory_bytes=psutil.virtual_memory().total)
        return CudaDevice(config.max_gpu_mem, int(index or rank.local), config.budget_scope)
    check_device(config, on_cpu=True, memory_bytes=psutil.virtual_memory().total)
    return CpuDevice(config.max_gpu_mem)


def rehearse() -> None:
    """Cut and profile a toy, so that what this imports and caches is there before the floor is taken."""
    toy = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    chain = capture(toy, TensorSpec((4,), torch.float32))
    profile(chain, optimizers=[OptimizerSpec("adam")], device=torch.device("cpu"))


def _prepare_optimizer(config: FitConfig) -> None:
    """The same as `rehearse` for what only some states of an optimizer need."""
    if config.optimizer_state == "int8":
        prepare_levels()

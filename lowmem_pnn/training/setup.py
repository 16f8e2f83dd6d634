"""Setup: the device and the workload on it, ready for a plan, and what has to be in memory before the floor is taken."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import psutil
import torch
from torch import nn

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.config.checks import check_device
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.gpu_description import GpuDescription
from lowmem_pnn.device import CpuDevice, CudaDevice, Device
from lowmem_pnn.device.described import DescribedGpu
from lowmem_pnn.device.support import device_taken, has_driver, missing_kernels, why_no_gpu
from lowmem_pnn.memory.available import available_bytes
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.optim.low_precision import load_int8_levels
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling.memory_profiler import profile
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.run.only_run import alone_on_gpus
from lowmem_pnn.run.ranks import ALONE, Rank
from lowmem_pnn.samples.readers import Readers
from lowmem_pnn.stores.disk import spare_page_cache
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload, make_workload, with_compiled_layers
from lowmem_pnn.workload.inputs import Inputs
from lowmem_pnn.zoo.deferred_init import skeleton


@contextmanager
def open_workload(
    config: FitConfig,
    inputs: Inputs,
    rank: Rank = ALONE,
    display: Display | None = None,
    gpu: GpuDescription | None = None,
) -> Iterator[tuple[Device, Workload]]:
    """Open the training device, and make the workload that is to be trained on it.

    Layers are compiled before the floor is taken: the compiler is no part of training, and nothing of the model is there while it runs.

    Args:
        config: options of the run.
        inputs: model and data, open.
        rank: which of several processes this is.
        display: is told that layers are compiled.
        gpu: GPU to plan for, which is not here; None for the device that the options name.

    Yields:
        The open device, and the workload.

    Raises:
        BusyError: this thread has a run on a GPU already, and this one would be on a GPU too.
    """
    if config.optimizer_state == "int8":
        load_int8_levels()
    # What the model's constructor imports belongs to the floor. What is wrong with it is said below.
    with suppress(Exception):
        skeleton(inputs.source.build, seed=config.seed)
    device = _device_of(config, rank) if gpu is None else _described(config, gpu)
    if display is not None and config.device == "auto" and device.kind == "cpu" and (why := _why_not_taken()):
        display.message(f"training on the CPU: {why}")
    compiled = None
    if config.compile:
        if display is not None:
            display.stage("compiling layers")
        compiled = with_compiled_layers(make_workload(config, *inputs, device.torch_device), device.torch_device)
    with alone_on_gpus(device), device, tf32_products(config.tf32 and device.kind == "cuda"):
        if display is not None:
            _say_what_is_free(device, display)
        spare_page_cache(device.is_unified)
        yield device, compiled or make_workload(config, *inputs, device.torch_device)


@contextmanager
def reading(config: FitConfig, inputs: Inputs, display: Display | None = None) -> Iterator[Inputs]:
    """Have samples read by other processes, where that is asked for. They are started before the floor is taken.

    Args:
        config: options of the run.
        inputs: model and data, open.
        display: is told of the processes.

    Yields:
        The same, with parts of the data that other processes read.
    """
    if not config.workers:
        yield inputs
        return
    if display is not None:
        what = "process reads" if config.workers == 1 else "processes read"
        display.message(
            f"{config.workers} {what} samples; their memory is the host's, and not in the budget (host_peak_bytes has it)"
        )
    with Readers(inputs.splits, config.workers, inputs.dataset.name) as readers:
        yield inputs._replace(splits=dict(readers.serve()))


def _device_of(config: FitConfig, rank: Rank) -> Device:
    device = device_taken(config.device, rank.local)
    if device != "cpu":
        check_device(config, on_cpu=False, memory_bytes=psutil.virtual_memory().total)
        index = torch.device(device).index
        return CudaDevice(config.max_gpu_mem, index, config.budget_scope, max_host_mem=config.max_host_mem)
    check_device(config, on_cpu=True, memory_bytes=psutil.virtual_memory().total)
    return CpuDevice(config.max_gpu_mem)


@contextmanager
def tf32_products(wanted: bool) -> Iterator[None]:
    """Return a context in which PyTorch multiplies matrices of float32 in TF32.

    Args:
        wanted: whether it is to be so; else what the process has set stays.
    """
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if wanted:
            torch.set_float32_matmul_precision(before)


def _why_not_taken() -> str | None:
    """Say why a GPU that seems to be there is not taken; None where there is none."""
    if torch.cuda.is_available():
        return missing_kernels(0)
    return f"no GPU is taken, though there is a driver: {why_no_gpu()}" if has_driver() else None


def _say_what_is_free(device: Device, display: Display) -> None:
    """Say it if a budget on the CPU is more than is free beside the floor, which holds data that lie in memory too."""
    if device.shares_host and device.budget_bytes > (free := available_bytes()):
        display.message(
            f"the budget is {format_bytes(device.budget_bytes)}, and {format_bytes(free)} are free beside libraries and data "
            f"({format_bytes(device.floor_bytes)}): a run that needs more may be swapped or killed by the system; give less --max-gpu-mem"
        )


def _described(config: FitConfig, gpu: GpuDescription) -> Device:
    check_device(config, on_cpu=False, memory_bytes=psutil.virtual_memory().total)
    return DescribedGpu(config.max_gpu_mem, gpu, config.budget_scope)


@cache
def warm_up_profiler() -> None:
    """Profile a tiny model, once in a process, so that lazy imports and caches count in the memory baseline."""
    tiny = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    chain = capture(tiny, TensorSpec((4,), torch.float32))
    profile(chain, optimizers=[OptimizerSpec("adam")], device=torch.device("cpu"))

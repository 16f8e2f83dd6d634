"""The plain process: a few steps of ordinary PyTorch, with everything in memory, with checkpointing, or with accumulated gradients.

python -m lowmem_pnn.contenders.plain_process FILE   # its settings as JSON; says `floor BYTES` when it begins, and its figures at the end
"""

import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.device.cpu import warm_up
from lowmem_pnn.device.support import is_gpu
from lowmem_pnn.errors import BudgetError, LowMemError
from lowmem_pnn.memory.process_meter import private_bytes
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.training.parity import layers_of, run_model
from lowmem_pnn.training.setup import tf32_products
from lowmem_pnn.workload import Workload, make_workload
from lowmem_pnn.workload.inputs import named_inputs

Baseline = Literal["plain", "checkpointing", "accumulation"]
BASELINES: tuple[Baseline, ...] = ("plain", "checkpointing", "accumulation")
ACCUMULATED = 8
"""Micro-batches that accumulate the gradient of a batch."""

Batch = tuple[Any, Any]


def train(workload: Workload, baseline: Baseline, device: torch.device) -> dict[str, float]:
    """Train for an epoch; return samples, seconds, and the loss of the last batch.

    Args:
        workload: model and data, for the method `backprop`.
        baseline: how plain PyTorch is kept in memory.
        device: where it trains.
    """
    config = workload.config
    model = workload.build_model(config.seed).to(device).train()
    (batch_size,) = config.batch_sizes
    parts = ACCUMULATED if baseline == "accumulation" else 1
    samples, loss = 0, 0.0
    with layers_of(workload, model) if baseline == "checkpointing" else _Nothing() as loaded:
        learning = list({id(each): each for each in (loaded.values() if loaded else model.parameters())}.values())
        optimizer = _optimizer(config, [parameter for parameter in learning if parameter.requires_grad])
        forward = _checkpointed(workload) if loaded else partial(run_model, model, workload.bare)
        began = time.monotonic()
        torch.manual_seed(seed_of(config.seed, "bench"))
        split = workload.splits["train"]
        for start in range(0, len(split), batch_size):
            numbers = range(start, min(start + batch_size, len(split)))
            size = math.ceil(len(numbers) / parts)
            loss = 0.0
            for begin in range(0, len(numbers), size):
                part = _moved(split.batch(numbers[begin : begin + size]), device)
                with workload.bare.layers[0].precision.autocast():
                    outputs = forward(part)
                share = min(size, len(numbers) - begin) / len(numbers)
                mean = workload.task.loss(outputs, part[1], training=True) * share
                del outputs
                torch.autograd.backward(mean)
                loss += float(mean.detach())
                del mean
            optimizer.step()
            optimizer.zero_grad()
            samples += len(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - began
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return {"samples": samples, "seconds": seconds, "loss": loss, "device_peak_bytes": peak}


def _checkpointed(workload: Workload) -> Callable[[Batch], tuple[Tensor, ...]]:
    """Return a forward in about as many segments as the square root of the layers' number; the last one recomputes nothing."""
    layers = workload.bare.layers
    for layer in layers:
        layer.train()
    size = math.ceil(math.sqrt(len(layers)))
    segments = [layers[begin : begin + size] for begin in range(0, len(layers), size)]

    def forward(batch: Batch) -> tuple[Tensor, ...]:
        tensors: tuple[Tensor, ...] = batch[0] if isinstance(batch[0], tuple) else (batch[0],)
        for segment in segments[:-1]:
            tensors = checkpoint(partial(_run, segment), *tensors, use_reentrant=False)
        return _run(segments[-1], *tensors)

    return forward


def _run(layers: Sequence[Layer], *tensors: Tensor) -> tuple[Tensor, ...]:
    for layer in layers:
        tensors = layer(*tensors)
    return tensors


def _optimizer(config: FitConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    lr, decay = config.lr[0], config.weight_decay
    if config.optimizer[0] == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay, fused=config.fused)
    kind = torch.optim.AdamW if config.optimizer[0] == "adamw" else torch.optim.Adam
    return kind(parameters, lr=lr, weight_decay=decay, fused=config.fused)


def _moved(batch: Batch, device: torch.device) -> Batch:
    samples, targets = batch
    moved = tuple(each.to(device) for each in samples) if isinstance(samples, tuple) else samples.to(device)
    return moved, targets.to(device)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def main() -> None:
    """Train as the file in the command line says, and print what came of it."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    config = FitConfig.from_json(json.dumps(settings["config"]))
    device = torch.device("cpu")
    if is_gpu(config.device):
        device = torch.device("cuda" if config.device == "auto" else config.device)
    try:
        workload = make_workload(config, *named_inputs(config), device)
        warm_up(device)
        gc.collect()
        print("floor", private_bytes(), flush=True)
        # As a run does.
        with tf32_products(config.tf32 and device.type == "cuda"):
            figures = train(workload, settings["baseline"], device)
        print(json.dumps(figures), flush=True)
    except LowMemError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {one_line(error)}", file=sys.stderr)
        sys.exit(BudgetError.exit_code)


if __name__ == "__main__":
    main()

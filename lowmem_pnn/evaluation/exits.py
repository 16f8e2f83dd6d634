"""Early exits: how good and how fast each is, which one is taken, and the model that ends there.

x --[layer 1]--[layer 2]--[layer 3]-- scores        the whole model
                   |
                 head 2 -- scores                   exit 2: layers 1 and 2, and a head
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn.methods.similarity import exit_head
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.model.layer import is_of_head
from lowmem_pnn.run.run import Run

HEADS_FILE = "heads.safetensors"
"""Name of the file of trained heads in a run's folder."""

_REPEATS = 3
_MOST_SAMPLES = 64


def choose_exit(accuracies: Sequence[float], tolerance: float) -> int:
    """Choose the smallest prefix of the model that is nearly as good as the best.

    Args:
        accuracies: accuracy of every exit on the validation split, the whole model's last.
        tolerance: how far below the best accuracy the chosen exit's may be.

    Returns:
        The number of the exit, from 0.

    Example:
        >>> choose_exit([0.50, 0.79, 0.795, 0.80], tolerance=0.01)
        1
    """
    best = max(accuracies)
    return next(number for number, accuracy in enumerate(accuracies) if accuracy >= best - tolerance)


def chosen_exit(exits: Sequence[Mapping[str, Any]], tolerance: float, *, by_loss: bool = False) -> int | None:
    """Return the number, from 1, of the exit that `choose_exit` takes; None where none was validated.

    Args:
        exits: what `describe_exits` gave.
        tolerance: as for `choose_exit`; of losses, by which share the chosen exit's may be above the least.
        by_loss: whether exits are compared by their validation losses: the accuracy of single labels, most of which no sample has, is nearly
            the same for a model that has learnt nothing.

    Example:
        >>> exits = [{"val_accuracy": 0.963, "val_loss": 0.15}, {"val_accuracy": 0.968, "val_loss": 0.11}]
        >>> chosen_exit(exits, 0.01), chosen_exit(exits, 0.01, by_loss=True)
        (1, 2)
    """
    if by_loss:
        losses = [exit["val_loss"] for exit in exits]
        if not exits or None in losses:
            return None
        return next(number for number, loss in enumerate(losses, start=1) if loss <= min(losses) * (1 + tolerance))
    accuracies = [exit["val_accuracy"] for exit in exits]
    return None if not exits or None in accuracies else 1 + choose_exit(accuracies, tolerance)


def head_names(chain: Chain) -> list[str]:
    """Return the names of all heads' tensors."""
    return [name for layer in chain.layers for name in (*layer.parameters(), *layer.buffers()) if is_of_head(name)]


def num_parameters(chain: Chain, number: int) -> int:
    """Count the elements of the parameters of the model that ends at an exit: its layers, and its head."""
    body = {
        id(p): p.numel() for layer in chain.layers[: number + 1] for name, p in layer.parameters().items() if not is_of_head(name)
    }
    head = chain.layers[number].head
    return sum(body.values()) + (sum(p.numel() for p in exit_head(head).parameters()) if head is not None else 0)


def throughputs(run: Run) -> list[float]:
    """Measure samples per second through the model that ends at each exit, in eval mode; one partition is resident at a time.

    Args:
        run: a trained run.
    """
    bodies, heads = [], []
    for number, part in enumerate(run.plan.partitions):
        active = run.partitions.load(number, learns=False)
        try:
            samples = min(active.micro_batch, _MOST_SAMPLES)
            specs = run.workload.chain.boundaries[part.start]
            device = run.session.device.torch_device
            tensors = tuple(torch.zeros(samples, *spec.shape, dtype=spec.dtype, device=device) for spec in specs)
            with torch.no_grad():
                for layer in active.residency.layers:
                    layer.eval()
                    outputs = layer(*tensors)
                    bodies.append(_seconds(run, layer, tensors) / samples)
                    heads.append(0.0 if layer.head is None else _seconds(run, layer.scores, (outputs,)) / samples)
                    tensors = outputs
        finally:
            active.residency.unload()
    return [1 / (sum(bodies[: number + 1]) + head) for number, head in enumerate(heads)]


def _seconds(run: Run, work: Callable[..., object], arguments: tuple[Any, ...]) -> float:
    """Time a call: the median of a few, in seconds."""
    times = []
    for _ in range(_REPEATS):
        run.session.device.synchronize()
        began = time.perf_counter()
        work(*arguments)
        run.session.device.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def describe_exits(run: Run, test_accuracies: Sequence[float | None]) -> list[dict[str, Any]]:
    """Return what `result.json` says of every exit.

    Args:
        run: a trained run whose layers learnt by losses of their own.
        test_accuracies: accuracy of every exit on the test data, or None where there is no test data.
    """
    validated = [accuracy for record in run.state.records for accuracy in record.unit_val_accuracies]
    losses = [loss for record in run.state.records for loss in record.unit_val_losses]
    chain, speeds = run.workload.chain, throughputs(run)
    return [
        {
            "number": number + 1,
            "layer": layer.name,
            "params": num_parameters(chain, number),
            "val_accuracy": validated[number] if validated else None,
            "val_loss": losses[number] if losses else None,
            "test_accuracy": test_accuracies[number],
            "samples_per_second": speeds[number],
        }
        for number, layer in enumerate(chain.layers)
    ]


class ExitModel(nn.Module):
    """The model up to an exit, as one module: (B, ...) samples to (B, classes) scores.

    Args:
        chain: the model, with its tensors.
        number: number of the exit, from 0.
    """

    def __init__(self, chain: Chain, number: int) -> None:
        super().__init__()
        layers = chain.layers[: number + 1]
        head = layers[-1].head
        self.head = None if head is None else exit_head(head)
        self.body = nn.ModuleList(layer.module for layer in layers)
        for layer in layers:
            if layer.head is not None:
                # No head but the exit's is part of the model.
                container = next(name for name, _ in layer.module.named_children() if is_of_head(f"{name}."))
                delattr(layer.module, container)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores."""
        tensors: tuple[Tensor, ...] = (x,)
        for module in self.body:
            tensors = module(*tensors)
        return tensors[0] if self.head is None else self.head(tensors[0])


class SeveralTensorsModel(ExitModel):
    """The same of a model that takes several tensors, or gives several: each an argument of its own, and a tuple of what comes out."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return the output tensors in their order."""
        tensors = inputs
        for module in self.body:
            tensors = module(*tensors)
        return tensors if self.head is None else (self.head(tensors[0]),)

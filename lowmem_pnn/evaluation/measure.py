"""Measuring: samples through all partitions of a model, one after the other, in eval mode."""

import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.loaders import Loader
from lowmem_pnn.engine.tally import Tally
from lowmem_pnn.errors import DivergedError
from lowmem_pnn.methods.base import SplitName, evaluation
from lowmem_pnn.run.run import Run

_T = TypeVar("_T")


def measure(
    run: Run,
    split: SplitName,
    work: Callable[[tuple[Tensor, ...], Tensor], _T],
    consume: Callable[[_T], None],
    *,
    may_stop: bool = True,
    on_partition: Callable[[ActivePartition, Loader], None] = lambda stage, loader: None,
) -> None:
    """Send one part of the data through all partitions, one after the other, in eval mode.

    Args:
        run: nothing of it is resident.
        split: which part.
        work: what to do with outputs, on the device, and labels, on the host; done again where memory runs out in it.
        consume: takes what `work` gave, once for every sample.
        may_stop: the run is at a commit, and can end here if it is asked to.
        on_partition: called with every partition that is resident, and its samples.
    """
    folders: list[Path] = []
    for visit in evaluation(len(run.plan.partitions), split):
        stage = run.stage(visit.partition, learns=False)
        try:
            with ExitStack() as stack:
                loader = run.loader(stack, visit.partition, visit.split, folders[-1] if folders else None)
                on_partition(stage, loader)
                if stage.is_last:
                    run.executor.forward(stage, loader, work, consume)
                else:
                    folders.append(run.activations / f"b{visit.partition + 1:02d}-{visit.split}-measured")
                    run.write(stage, loader, folders[-1], may_stop=may_stop)
        finally:
            stage.residency.unload()
        for folder in folders[:-1] if not stage.is_last else folders:
            shutil.rmtree(folder, ignore_errors=True)


def validate(run: Run, where: str) -> None:
    """Measure the whole model on the validation split, into the last partition's record.

    Args:
        run: with no partition resident.
        where: for the message of what it raises.

    Raises:
        DivergedError: the loss is not finite.
    """
    tally = Tally()
    objective = run.workload.objective(run.plan, len(run.plan.partitions) - 1)
    objective.prepare(run.device.torch_device)

    def work(outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[float, int, int | None]:
        labels = run.device.to_device(labels)
        return float(objective.loss(outputs, labels)), labels.numel(), objective.num_correct(outputs, labels)

    def of_units(stage: ActivePartition, loader: Loader) -> None:
        if stage.objective.per_layer_loss:
            tallies = run.executor.measure(stage, loader)
            record = run.state.records[stage.number]
            record.val_loss, record.val_accuracy = tallies[-1].loss, tallies[-1].accuracy
            record.unit_val_accuracies = [tally.accuracy or 0.0 for tally in tallies]

    measure(run, "val", work, lambda counts: tally.add(*counts), may_stop=False, on_partition=of_units)
    check_validation(tally, where)
    record = run.state.records[-1]
    record.val_loss, record.val_accuracy = tally.loss, tally.accuracy


def check_validation(measured: Tally, where: str) -> None:
    """Refuse a validation loss that is not finite.

    Args:
        measured: of the split.
        where: for the message.

    Raises:
        DivergedError: it is not.
    """
    if not math.isfinite(measured.loss):
        raise DivergedError(f"the validation loss became {measured.loss} in {where}; the last commit is kept; try a lower --lr")

"""Samples through all partitions of a model, one after the other, in eval mode: validation, and any other measure of outputs."""

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
from lowmem_pnn.methods import SplitName, evaluation_visits
from lowmem_pnn.run.run import Run
from lowmem_pnn.tasks import Scores

_T = TypeVar("_T")


def measure(
    run: Run,
    split: SplitName,
    work: Callable[[tuple[Tensor, ...], Tensor], _T],
    consume: Callable[[_T], None],
    *,
    may_stop: bool = True,
    on_partition: Callable[[ActivePartition, Loader], None] = lambda active, loader: None,
) -> None:
    """Send one part of the data through all partitions, one after the other, in eval mode.

    Args:
        run: the run, with no partition resident.
        split: part of the data.
        work: what to do with outputs, on the device, and labels, on the host; done again where memory runs out in it.
        consume: takes what `work` gave, once for every sample.
        may_stop: whether the run is at a commit, and can end here if it is asked to.
        on_partition: called with every partition that is resident, and its samples.
    """
    partitions = run.partitions
    folders: list[Path] = []
    for visit in evaluation_visits(len(run.plan.partitions), split):
        active = partitions.load(visit.partition, learns=False)
        try:
            with ExitStack() as stack:
                loader = partitions.loader(stack, visit.partition, visit.split, folders[-1] if folders else None)
                on_partition(active, loader)
                if active.is_last:
                    partitions.executor.forward(active, loader, work, consume)
                else:
                    folders.append(run.commits.activations / f"b{visit.partition + 1:02d}-{visit.split}-measured")
                    if may_stop:
                        partitions.write_outputs(active, loader, folders[-1], on_micro_batch=run.commits.stop_if_asked)
                    else:
                        partitions.write_outputs(active, loader, folders[-1])
        finally:
            active.residency.unload()
        for folder in folders[:-1] if not active.is_last else folders:
            shutil.rmtree(folder, ignore_errors=True)


def validate(run: Run, where: str) -> None:
    """Measure the whole model on the validation split, into the last partition's record.

    Args:
        run: the run, with no partition resident.
        where: what was trained, for the message where the loss is not finite.
    """
    measured = Measured(run)

    def measure_layers(active: ActivePartition, loader: Loader) -> None:
        if active.objective.per_layer_loss:
            tallies = run.partitions.executor.measure(active, loader)
            run.record_validation(active.number, tallies[-1], tallies)
            run.record_losses(active.number, tallies)

    measure(run, "val", measured.of, measured.merge, may_stop=False, on_partition=measure_layers)
    measured.record(where)


class Measured:
    """What was measured of the whole model on the validation split: loss, accuracy, and all other scores where one of them is watched.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._task, config = run, run.workload.task, run.workload.config
        self._objective = run.workload.objective(run.plan, run.partitions.last)
        self._objective.prepare(run.session.device.torch_device)
        self._all = config.watches and config.monitored[1] not in ("val_loss", "val_accuracy")
        self._tally, self._scores = Tally(), self._task.scores()

    def of(self, outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[Tally, Scores]:
        """Measure a micro-batch.

        Args:
            outputs: outputs of the model, (B, ...) each, on the device.
            labels: targets (B, ...), on the host.
        """
        scores = self._task.scores()
        if self._all:
            scores.add(outputs, labels)
        return Tally.of(self._objective, outputs, self._run.session.device.to_device(labels), answers=True), scores

    def merge(self, measured: tuple[Tally, Scores]) -> None:
        """Count what `of` gave of a micro-batch."""
        self._tally.merge(measured[0])
        if self._all:
            self._scores.merge(measured[1])

    def record(self, where: str) -> None:
        """Record it all as the last partition's.

        Args:
            where: what was trained, for the message where the loss is not finite.
        """
        say_if_not_finite(self._run, self._tally, where)
        scores = self._scores.result() if self._all else {}
        self._run.record_validation(self._run.partitions.last, self._tally, scores=scores)


def say_if_not_finite(run: Run, measured: Tally, where: str) -> None:
    """Say that a validation loss is not finite; training goes on, as it would in a plain loop.

    Args:
        run: the run.
        measured: loss over the validation split.
        where: what was trained, for the message.
    """
    if not math.isfinite(measured.loss):
        run.session.display.message(f"the validation loss is {measured.loss} in {where}; training goes on")

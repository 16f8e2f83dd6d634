"""Sweeping: epochs in which every batch goes through all partitions and back."""

import math
from collections.abc import Sequence
from contextlib import ExitStack

from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.engine.executor import too_few
from lowmem_pnn.engine.loaders import Batch, DatasetLoader, Loader
from lowmem_pnn.engine.tally import Tally
from lowmem_pnn.evaluation.measure import validate
from lowmem_pnn.methods import Sweep
from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.run.metrics import EpochTimer, log_epoch, log_step
from lowmem_pnn.run.run import Run, roll_back_with_smaller_micro_batch
from lowmem_pnn.sweep.sweeper import Sweeper


def sweep_all(run: Run, sweep: Sweep) -> None:
    """Train by sweeps, from wherever the run's state says, for all epochs.

    Args:
        run: no partition is resident.
        sweep: its visits.
    """
    state, workload, last = run.state, run.workload, len(run.plan.partitions) - 1
    split = workload.splits["train"]
    steps = math.ceil(len(split) / sweep.batch_size)
    augments = workload.config.augment != "none"
    loader = DatasetLoader(split, workload.config.seed, run.threads.read, mix=True, phase=sweep.phase, augments=augments)
    what = "recovery" if sweep.phase == "recovery" else "all partitions"
    with ExitStack() as stack:
        sweeper = Sweeper(
            workload,
            run.plan,
            sweep,
            run.device,
            run.weights,
            run.threads,
            run.counter,
            run.rundir.path,
            sweep.epochs * steps,
            run.begin_record,
        )
        stack.callback(sweeper.close)
        while state.progress.epoch < sweep.epochs:
            progress = state.progress
            pace = EpochTimer(run, progress.tally.num_samples)
            run.display.start_epoch(what, progress.epoch, sweep.epochs, loader.num_samples, progress.tally.num_samples)
            if not _sweep_epoch(run, sweep, sweeper, loader, steps):
                sweeper.close()
                state.sweep_micro_batch = roll_back_with_smaller_micro_batch(run, state.sweep_micro_batch)
                continue
            run.end_record()
            tally, progress.tally = progress.tally, Tally()
            pace.end(tally.num_samples)
            record = state.records[last]
            record.train_loss = tally.loss
            sweeper.settle()
            if "val" in workload.splits:
                sweeper.rest()
                validate(run, f"epoch {progress.epoch}")
            log_epoch(run, sweep, last, run.state.sweep_micro_batch, pace)
            if progress.epoch < sweep.epochs:
                run.maybe_commit(lambda: _save_swept(sweeper, sweep))


def _sweep_epoch(run: Run, sweep: Sweep, sweeper: Sweeper, loader: Loader, steps: int) -> bool:
    """The rest of an epoch; False if a batch did not fit, after which weights are no commit's."""
    progress, smallest = run.state.progress, run.plan.smallest_micro_batch
    last = len(run.plan.partitions) - 1
    batches = loader.batches(
        sweep.batch_size,
        shuffle=sweep.shuffle,
        epoch=progress.epoch,
        start=progress.batch,
        drawn=(sweep.phase, progress.epoch),
    )
    for batch in run.threads.stalls.over(loader.waits_for, batches):
        step, loss = progress.epoch * steps + progress.batch, None
        if len(batch[1]) >= smallest:  # a last batch of 1 tells BatchNorm nothing
            loss = _unless_full(sweeper, batch, step, run.state.sweep_micro_batch, run.state.loss_scales[-1])
            if loss is None:
                return False
            progress.tally.add(loss, len(batch[1]))
        progress.batch += 1
        del batch
        run.after_batch(sweeper.title(last))
        log_step(
            run,
            "sweep",
            progress.epoch,
            step + 1,
            loss,
            lambda step: run.workload.learning_rate(last, step, sweep.epochs * steps),
        )
        if progress.batch < steps:
            run.maybe_commit(lambda: _save_swept(sweeper, sweep))
    if not progress.tally.num_samples:
        raise too_few(loader.num_samples, sweeper.title(last), smallest)
    progress.epoch += 1
    progress.batch = 0
    return True


def _unless_full(sweeper: Sweeper, batch: Batch, step: int, micro_batch: int, scale: LossScale) -> float | None:
    """A batch's loss, or None if memory ran out in it; the exception, which holds tensors, is gone by then."""
    try:
        return sweeper.train_batch(batch, step, micro_batch, scale)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None


def _save_swept(sweeper: Sweeper, sweep: Sweep) -> Sequence[int]:
    sweeper.settle()
    return sweep.learners

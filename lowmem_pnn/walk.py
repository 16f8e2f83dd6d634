"""The walk through a method's program: visits and sweeps, one after the other, from wherever the run's state says."""

import gc
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.errors import BudgetError, DivergedError
from lowmem_pnn.executor import Progress, Stage, Tally, too_few
from lowmem_pnn.feeds import Batch, DatasetFeed, Feed
from lowmem_pnn.joining import join
from lowmem_pnn.methods import Sweep, Visit
from lowmem_pnn.methods.base import Split, evaluation
from lowmem_pnn.run import Run, Save, nothing_changed
from lowmem_pnn.sweeper import Sweeper
from lowmem_pnn.units import format_bytes

_T = TypeVar("_T")


def train(run: Run) -> None:
    """Go through what is left of the program.

    Args:
        run: at a commit.

    Raises:
        Stopped: it was asked to stop; everything up to then is committed.
        DivergedError: the loss is not finite.
        BudgetError: not even the smallest micro-batch fits.
    """
    state = run.state
    program = run.program
    stage: Stage | None = None
    while state.visit < len(program):
        item = program[state.visit]
        if stage is not None and (isinstance(item, Sweep) or item.action == "join" or stage.number != item.partition):
            stage.residency.unload()
            stage = None
        save: Save = nothing_changed
        if isinstance(item, Sweep):
            _sweep(run, item)
            save = partial(_learners, item)
        elif item.action == "join":
            save = partial(join, run)
        else:
            learns = item.action == "learn"
            run.begin_record(item.partition)
            if stage is None:
                stage = run.stage(item.partition, learns=learns, total_steps=_steps(run, item))
            _learn(run, item, stage) if learns else _emit(run, item, stage)
            run.end_record()
            if learns:
                save = partial(run.save, stage)
        state.visit += 1
        state.progress = Progress()
        run.commit(save)
        if state.visit < len(program):
            run.stop_if_asked()
    if stage is not None:
        stage.residency.unload()
    run.wait()


def measure(
    run: Run,
    split: Split,
    work: Callable[[tuple[Tensor, ...], Tensor], _T],
    consume: Callable[[_T], None],
    *,
    may_stop: bool = True,
) -> None:
    """Send one part of the data through all partitions, one after the other, in eval mode.

    Args:
        run: nothing of it is resident.
        split: which part.
        work: what to do with outputs, on the device, and labels, on the host; done again where memory runs out in it.
        consume: takes what `work` gave, once for every sample.
        may_stop: the run is at a commit, and can end here if it is asked to.
    """
    folders: list[Path] = []
    for visit in evaluation(len(run.plan.partitions), split):
        stage = run.stage(visit.partition, learns=False)
        try:
            with ExitStack() as stack:
                feed = run.feed(stack, visit.partition, visit.split, folders[-1] if folders else None)
                if stage.is_last:
                    run.executor.forward(stage, feed, work, consume)
                else:
                    folders.append(run.activations / f"b{visit.partition + 1:02d}-{visit.split}-measured")
                    run.write(stage, feed, folders[-1], may_stop=may_stop)
        finally:
            stage.residency.unload()
        for folder in folders[:-1] if not stage.is_last else folders:
            shutil.rmtree(folder, ignore_errors=True)


def _learn(run: Run, visit: Visit, stage: Stage) -> None:
    progress, record = run.state.progress, run.state.records[visit.partition]
    if stage.residency.optimizer is None:
        run.display.message(f"{stage.title} has only frozen weights: nothing to learn")
        return
    steps = math.ceil(len(run.workload.splits["train"]) / stage.batch_size)

    save = partial(run.save, stage)

    def after_batch(loss: float | None) -> None:
        run.after_batch(stage.title)
        _log_step(run, visit.action, progress.epoch, progress.epoch * steps + progress.batch, loss, stage.learning_rate)
        # At an epoch's last batch the commit is the epoch's own: then position and measurements belong together.
        if progress.batch < steps:
            run.maybe_commit(save)

    with ExitStack() as stack:
        if visit.from_codes:
            # What it would be measured on are the very codes that it learns from.
            feed, val = run.feed_of_codes(visit.partition), None
        else:
            feed = run.feed(stack, visit.partition, "train", _folder(run, "train"))
            val = run.feed(stack, visit.partition, "val", _folder(run, "val")) if "val" in run.workload.splits else None
        while progress.epoch < visit.epochs:
            began, done = time.monotonic(), progress.tally.num_samples
            run.display.start_epoch(stage.title, progress.epoch, visit.epochs, feed.num_samples, done)
            run.executor.learn_epoch(stage, feed, progress, after_batch)
            tally, progress.tally = progress.tally, Tally()
            speed = (tally.num_samples - done) / max(time.monotonic() - began, 1e-9)
            record.train_loss = tally.loss
            if val is not None:
                measured = run.executor.measure(stage, val)
                _check_validation(measured, f"{stage.title}, epoch {progress.epoch}")
                record.val_loss, record.val_accuracy = measured.loss, measured.accuracy
            _log_epoch(run, visit, visit.partition, stage.micro_batch, speed)
            if progress.epoch < visit.epochs:
                run.maybe_commit(save)


def _emit(run: Run, visit: Visit, stage: Stage) -> None:
    folder = run.activations / f"b{visit.partition + 1:02d}-{visit.split}"
    with ExitStack() as stack:
        feed = run.feed(stack, visit.partition, visit.split, _folder(run, visit.split))
        run.display.start_emit(stage.title, visit.split, feed.num_samples)
        run.write(stage, feed, folder)
    run.state.activations[visit.split] = folder.name
    run.state.progress.epoch = 1
    run.rundir.log(
        {"visit": run.state.visit, "action": visit.action, "partition": visit.partition, "split": visit.split, **run.totals()}
    )


def _sweep(run: Run, sweep: Sweep) -> None:
    state, workload, last = run.state, run.workload, len(run.plan.partitions) - 1
    split = workload.splits["train"]
    steps = math.ceil(len(split) / sweep.batch_size)
    feed = DatasetFeed(split, workload.config.seed, run.threads.read, mix=True, place=sweep.place)
    what = "recovery" if sweep.place == "recovery" else "all partitions"
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
            began, done = time.monotonic(), progress.tally.num_samples
            run.display.start_epoch(what, progress.epoch, sweep.epochs, feed.num_samples, done)
            if not _sweep_epoch(run, sweep, sweeper, feed, steps):
                sweeper.close()
                _go_back(run)
                continue
            run.end_record()
            tally, progress.tally = progress.tally, Tally()
            speed = (tally.num_samples - done) / max(time.monotonic() - began, 1e-9)
            record = state.records[last]
            record.train_loss = tally.loss
            sweeper.settle()
            if "val" in workload.splits:
                sweeper.rest()
                validate(run, f"epoch {progress.epoch}")
            _log_epoch(run, sweep, last, run.state.sweep_micro_batch, speed)
            if progress.epoch < sweep.epochs:
                run.maybe_commit(lambda: _save_swept(sweeper, sweep))


def _sweep_epoch(run: Run, sweep: Sweep, sweeper: Sweeper, feed: Feed, steps: int) -> bool:
    """The rest of an epoch; False if a batch did not fit, after which weights are no commit's."""
    progress, smallest = run.state.progress, run.plan.smallest_micro_batch
    last = len(run.plan.partitions) - 1
    for batch in feed.batches(sweep.batch_size, shuffle=sweep.shuffle, epoch=progress.epoch, start=progress.batch):
        step, loss = progress.epoch * steps + progress.batch, None
        if len(batch[1]) >= smallest:  # a last batch of 1 tells BatchNorm nothing
            loss = _unless_full(sweeper, batch, step, run.state.sweep_micro_batch)
            if loss is None:
                return False
            progress.tally.add(loss, len(batch[1]))
        progress.batch += 1
        del batch
        run.after_batch(sweeper.title(last))
        _log_step(
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
        raise too_few(feed.num_samples, sweeper.title(last), smallest)
    progress.epoch += 1
    progress.batch = 0
    return True


def _unless_full(sweeper: Sweeper, batch: Batch, step: int, micro_batch: int) -> float | None:
    """A batch's loss, or None if memory ran out in it; the exception, which holds tensors, is gone by then."""
    try:
        return sweeper.train_batch(batch, step, micro_batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None


def _go_back(run: Run) -> None:
    """To the last commit, with half the micro-batch: some partitions of the batch that did not fit have been stepped.

    Raises:
        BudgetError: it is the smallest already.
    """
    used, size = run.device.section_peak_bytes(), run.state.sweep_micro_batch
    smallest = run.plan.smallest_micro_batch
    if size <= smallest:
        raise BudgetError(
            f"memory ran out with a micro-batch of {size}, the smallest: {format_bytes(used)} of "
            f"{format_bytes(run.device.budget_bytes)} were in use; give a larger --max-gpu-mem, or more partitions"
        )
    run.go_back()
    gc.collect()  # exceptions and the frames of other threads may hold tensors in cycles
    run.device.release()
    run.device.begin_section()
    run.state.sweep_micro_batch = half = max(smallest, size // 2)
    run.state.oom_retries += 1
    run.display.message(f"out of memory; going on from the last commit with a micro-batch of {half}")


def _learners(sweep: Sweep) -> Sequence[int]:
    """What a sweep that is over has changed: all of it is in the working files."""
    return sweep.learners


def _save_swept(sweeper: Sweeper, sweep: Sweep) -> Sequence[int]:
    sweeper.settle()
    return sweep.learners


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
        labels = run.device.place(labels)
        return float(objective.loss(outputs, labels)), labels.numel(), objective.num_correct(outputs, labels)

    measure(run, "val", work, lambda counts: tally.add(*counts), may_stop=False)
    _check_validation(tally, where)
    record = run.state.records[-1]
    record.val_loss, record.val_accuracy = tally.loss, tally.accuracy


def _check_validation(measured: Tally, where: str) -> None:
    if not math.isfinite(measured.loss):
        raise DivergedError(f"the validation loss became {measured.loss} in {where}; the last commit is kept; try a lower --lr")


def _folder(run: Run, split: Split) -> Path | None:
    name = run.state.activations.get(split)
    return None if name is None else run.activations / name


def _steps(run: Run, visit: Visit) -> int:
    """Optimizer steps of a visit."""
    batch = run.plan.partitions[visit.partition].batch
    return visit.epochs * math.ceil(len(run.workload.splits["train"]) / batch)


def _log_step(run: Run, action: str, epoch: int, steps_done: int, loss: float | None, rate: Callable[[int], float]) -> None:
    if steps_done % run.workload.config.log_every:
        return
    line: dict[str, Any] = {
        "visit": run.state.visit,
        "action": action,
        "epoch": epoch + 1,
        "step": steps_done,
        "loss": loss,
        "lr": rate(steps_done - 1),
        **run.totals(),
    }
    run.rundir.log(line)


def _log_epoch(run: Run, item: Visit | Sweep, partition: int, micro_batch: int, speed: float) -> None:
    record, device = run.state.records[partition], run.device
    line: dict[str, Any] = {
        "visit": run.state.visit,
        "action": item.action if isinstance(item, Visit) else "sweep",
        "partition": partition,
        "epoch": run.state.progress.epoch,
        "train_loss": record.train_loss,
        "val_loss": record.val_loss,
        "val_accuracy": record.val_accuracy,
        "samples_per_second": speed,
        "micro_batch": micro_batch,
        "used_bytes": device.used_bytes(),
        "peak_bytes": device.section_peak_bytes() if isinstance(item, Visit) else device.peak_bytes,
        **run.totals(),
    }
    run.rundir.log(line)
    run.display.end_epoch(line)

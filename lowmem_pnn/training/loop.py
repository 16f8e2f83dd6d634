"""The walk through a method's program: visits and sweeps, one after the other, from wherever the run's state says."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.executor import SteppedInPart
from lowmem_pnn.engine.loaders import DatasetLoader, Loader, MacroBatchLoader, StoredMacroBatchLoader, ViewsLoader
from lowmem_pnn.engine.tally import EpochProgress, Tally
from lowmem_pnn.evaluation.measure import check_validation, validate
from lowmem_pnn.methods import Sweep, Visit
from lowmem_pnn.methods.base import SplitName
from lowmem_pnn.run.metrics import EpochTimer, log_epoch, log_joint_epoch, log_step
from lowmem_pnn.run.run import Run, Save, nothing_changed, roll_back_with_smaller_micro_batch
from lowmem_pnn.training.join import join
from lowmem_pnn.training.page_cache import PageCachePrefetch, next_partition
from lowmem_pnn.training.sweep_loop import sweep_all


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
    steps = Steps(run)
    stage: ActivePartition | None = None
    while state.visit < len(program):
        item = program[state.visit]
        if stage is not None and (isinstance(item, Sweep) or item.action == "join" or stage.number != item.partition):
            stage.residency.unload()
            stage = None
        save: Save = nothing_changed
        if isinstance(item, Sweep):
            sweep_all(run, item)
            save = partial(_learners, item)
        elif item.action == "join":
            save = partial(join, run)
        else:
            learns = item.action == "learn"
            run.begin_record(item.partition)
            if stage is None:
                stage = run.stage(item.partition, learns=learns, total_steps=steps.of(item.partition))
            if not learns:
                _emit(run, item, stage)
            elif not _learn(run, item, stage, steps.before[state.visit]):
                stage.residency.unload()
                stage, number = None, item.partition
                state.micro_batches[number] = roll_back_with_smaller_micro_batch(run, state.micro_batches[number])
                continue
            run.end_record()
            if learns:
                save = partial(run.save, stage)
        state.visit += 1
        state.progress = EpochProgress()
        _drop_unread(run)
        if isinstance(item, Visit) and item.macro_batch is not None:
            _end_stretch(run, item, stage, save)
            stage = None
            continue
        run.commit(save)
        if state.visit < len(program):
            run.stop_if_asked()
    if stage is not None:
        stage.residency.unload()
    run.wait()


def _end_stretch(run: Run, visit: Visit, stage: ActivePartition | None, save: Save) -> None:
    """The end of a visit of a macro-batch: the run is committed now and then, after its last visit."""
    if visit.action == "learn":
        run.keep(save)
    if stage is not None:
        stage.residency.unload()
    if visit.measures:
        validate(run, f"epoch {visit.epochs_before + 1}")
        log_joint_epoch(run, visit.epochs_before + 1)
    if visit.commits:
        run.maybe_commit(nothing_changed)


def _drop_unread(run: Run) -> None:
    """Forget the stores that no later visit reads: the next one begins with the data set, or is not of visits."""
    state, program = run.state, run.program
    item = program[state.visit] if state.visit < len(program) else None
    if item is None or isinstance(item, Sweep) or item.partition == 0:
        emits = isinstance(item, Visit) and item.action == "emit"
        if not emits:
            for name in state.activations.values():
                run.drop_store(name)
            state.activations = {}


class Steps:
    """Optimizer steps of a run's program, by partition.

    Args:
        run: whose program it is; not of sweeps, which count for themselves.
    """

    def __init__(self, run: Run) -> None:
        self._so_far = [0] * len(run.plan.partitions)
        # Before each item of the program, of its own partition.
        self.before: list[int] = []
        samples = len(run.workload.splits["train"])
        for item in run.program:
            if isinstance(item, Sweep):
                self.before.append(0)
                continue
            self.before.append(self._so_far[item.partition])
            if item.action == "learn":
                self._so_far[item.partition] += item.epochs * steps_of_epoch(
                    item, samples, run.plan.partitions[item.partition].batch
                )

    def of(self, partition: int) -> int:
        """In all its visits."""
        return self._so_far[partition]


def steps_of_epoch(visit: Visit, samples: int, batch: int) -> int:
    """Optimizer steps of one epoch of a visit: its last batch may be short.

    Args:
        visit: of `learn`.
        samples: to train on.
        batch: samples a step.
    """
    begin, end = visit.macro_batch or (0, samples)
    return math.ceil((end - begin) / batch)


def _learn(run: Run, visit: Visit, stage: ActivePartition, steps_before: int) -> bool:
    """All epochs of a visit; False if a batch did not fit, after which the weights are no commit's."""
    try:
        _learn_epochs(run, visit, stage, steps_before)
    except SteppedInPart:
        return False
    return True


def _learn_epochs(run: Run, visit: Visit, stage: ActivePartition, steps_before: int) -> None:
    progress, record = run.state.progress, run.state.records[visit.partition]
    if not stage.residency.optimizers:
        run.display.message(f"{stage.title} has only frozen weights: nothing to learn")
        return
    steps = steps_of_epoch(visit, len(run.workload.splits["train"]), stage.batch_size)
    save = partial(run.save, stage)
    following = next_partition(run.program, run.state.visit)
    warming = PageCachePrefetch(None if following is None else run.weights.newest(following), run.threads.read)

    def after_batch(loss: float | None) -> None:
        run.after_batch(stage.title)
        if progress.epoch == visit.epochs - 1:
            warming.go_on(progress.batch / steps)
        done = steps_before + progress.epoch * steps + progress.batch
        log_step(run, visit.action, visit.epochs_before + progress.epoch, done, loss, stage.learning_rate)
        # At an epoch's last batch the commit is the epoch's own: then position and measurements belong together.
        if progress.batch < steps and visit.macro_batch is None:
            run.maybe_commit(save)

    with ExitStack() as stack:
        if visit.from_synthetic_labels:
            # What it would be measured on are the very codes that it learns from.
            loader, val = run.synthetic_label_loader(visit.partition), None
        else:
            loader = _train_feed(run, stack, visit)
            val = None
            if "val" in run.workload.splits and visit.macro_batch is None:
                val = run.loader(stack, visit.partition, "val", _folder(run, "val"))
        while progress.epoch < visit.epochs:
            pace = EpochTimer(run, progress.tally.num_samples)
            run.display.start_epoch(stage.title, progress.epoch, visit.epochs, loader.num_samples, progress.tally.num_samples)
            run.executor.learn_epoch(
                stage, loader, progress, after_batch, epochs_before=visit.epochs_before, steps_before=steps_before
            )
            tally, progress.tally = progress.tally, Tally()
            pace.end(tally.num_samples)
            record.train_loss = tally.loss
            if val is not None:
                *units, measured = run.executor.measure(stage, val)
                check_validation(measured, f"{stage.title}, epoch {progress.epoch}")
                record.val_loss, record.val_accuracy = measured.loss, measured.accuracy
                if stage.objective.per_layer_loss:
                    record.unit_val_accuracies = [tally.accuracy or 0.0 for tally in (*units, measured)]
            if visit.macro_batch is None:
                log_epoch(run, visit, visit.partition, stage.micro_batch, pace)
            if progress.epoch < visit.epochs:
                run.maybe_commit(save)


def _emit(run: Run, visit: Visit, stage: ActivePartition) -> None:
    config = run.workload.config
    # A store that a commit names is not written to: where blocks take several turns, each has stores of its own.
    turn = f"-{run.state.visit}" if config.visits != "sequential" or config.views > 1 else ""
    folder = run.activations / f"b{visit.partition + 1:02d}-{visit.split}{turn}"
    key = _store_key(visit.split, visit.view)
    with ExitStack() as stack:
        if visit.split == "train" and (visit.macro_batch is not None or config.views > 1):
            loader = _train_feed(run, stack, visit)
        else:
            loader = run.loader(stack, visit.partition, visit.split, _folder(run, visit.split))
        run.display.start_emit(stage.title, visit.split, loader.num_samples)
        run.write(stage, loader, folder, kept_as=run.workload.config.activation_dtype)
    if (before := run.state.activations.get(key)) is not None:
        run.drop_store(before)
    run.state.activations[key] = folder.name
    run.state.progress.epoch = 1
    run.rundir.log(
        {"visit": run.state.visit, "action": visit.action, "partition": visit.partition, "split": visit.split, **run.totals()}
    )


def _train_feed(run: Run, stack: ExitStack, visit: Visit) -> Loader:
    """The training samples of a visit: an epoch's, a macro_batch of one, or those of a view."""
    config, partition = run.workload.config, visit.partition
    if visit.macro_batch is not None:
        loader = run.loader(stack, partition, "train", _folder(run, "train"))
        if partition > 0:
            return StoredMacroBatchLoader(loader)
        assert isinstance(loader, DatasetLoader)
        epoch = visit.epochs_before
        return MacroBatchLoader(loader, config.value_for("shuffle", 0), epoch, slice(*visit.macro_batch), ("epoch", epoch))
    if visit.action == "emit" and partition == 0:
        loader = run.loader(stack, partition, "train", None)
        assert isinstance(loader, DatasetLoader)
        return MacroBatchLoader(loader, False, 0, slice(None), ("view", visit.view))
    if partition == 0 or config.views == 1:
        return run.loader(stack, partition, "train", _folder(run, "train"))
    if visit.action == "emit":
        return run.loader(stack, partition, "train", _folder(run, "train", visit.view))
    views = ViewsLoader(lambda view: run.open_loader(partition, "train", _folder(run, "train", view)), config.views)
    stack.callback(views.close)
    return views


def _learners(sweep: Sweep) -> Sequence[int]:
    """What a sweep that is over has changed: all of it is in the working files."""
    return sweep.learners


def _store_key(split: SplitName, view: int) -> str:
    """What the journal calls the store of a split, or of one of its views."""
    return f"{split}+{view}" if view else split


def _folder(run: Run, split: SplitName, view: int = 0) -> Path | None:
    name = run.state.activations.get(_store_key(split, view))
    return None if name is None else run.activations / name

"""A method's program, carried out: its visits and sweeps, one after the other, from wherever the run's state says."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.loaders import (
    DatasetLoader,
    Loader,
    MacroBatchLoader,
    MixedLoader,
    StoredMacroBatchLoader,
    ViewsLoader,
)
from lowmem_pnn.engine.out_of_memory import SteppedInPart
from lowmem_pnn.evaluation.measure import validate
from lowmem_pnn.methods import SplitName, Sweep, Visit
from lowmem_pnn.run.commits import Save, nothing_changed
from lowmem_pnn.run.run import Run
from lowmem_pnn.training.join import join
from lowmem_pnn.training.loop import EpochLoop
from lowmem_pnn.training.meta_run import RunToEnd, train_meta_model
from lowmem_pnn.training.page_cache import PageCachePrefetch, next_partition
from lowmem_pnn.training.partition_learner import PartitionLearner
from lowmem_pnn.training.sweep_learner import SweepLearner


def carry_out(run: Run, run_to_end: RunToEnd) -> None:
    """Go through what is left of a run's program.

    Args:
        run: at a commit.
        run_to_end: trains a meta model, where the program has one.

    Raises:
        Stopped: the run was asked to stop; everything is committed up to then, or up to the outputs that were being written.
        DivergedError: a loss is not finite.
        BudgetError: not even the smallest micro-batch fits.
    """
    steps = StepCounts(run)
    active: ActivePartition | None = None
    while (item := run.item) is not None:
        if active is not None and not _goes_on_with(active, item):
            active.residency.unload()
            active = None
        save: Save = nothing_changed
        if isinstance(item, Sweep):
            if not _sweep(run, item):
                run.roll_back_with_smaller_micro_batch(None)
                continue
            save = partial(_changed, item)
        elif item.action == "join":
            save = partial(join, run)
        elif item.action == "meta":
            train_meta_model(run, item, run_to_end)
        else:
            learns = item.action == "learn"
            run.metrics.begin_record(item.partition)
            run.metrics.time_macro_batch(item)
            if active is None and item.thin and not learns:
                active = run.partitions.load_thin(item.partition)
            elif active is None:
                active = run.partitions.load(
                    item.partition, learns=learns, total_steps=steps.of(item.partition), frozen=item.frozen
                )
            if not learns:
                _emit(run, item, active)
            elif not _learn(run, item, active, steps):
                active.residency.unload()
                active = None
                run.roll_back_with_smaller_micro_batch(item.partition)
                continue
            run.metrics.end_record()
            if learns:
                save = partial(run.partitions.save, active)
        run.complete_item()
        if isinstance(item, Visit) and item.macro_batch is not None:
            _end_macro_batch(run, item, active, save)
            active = None
            continue
        run.commits.commit(save)
        if run.item is not None:
            run.commits.stop_if_asked()
    if active is not None:
        active.residency.unload()
    run.commits.wait()


def _goes_on_with(active: ActivePartition, item: Visit | Sweep) -> bool:
    """Return whether a visit is of the partition that is resident, or of its thin part where that is."""
    if isinstance(item, Sweep) or item.action in ("join", "meta"):
        return False
    is_thin = item.thin and item.action == "emit"
    return (active.number, active.is_thin, active.is_frozen_yet) == (item.partition, is_thin, item.frozen)


def _end_macro_batch(run: Run, visit: Visit, active: ActivePartition | None, save: Save) -> None:
    """End a visit of a macro-batch: the run is committed now and then, after the last of these visits."""
    if visit.action == "learn":
        run.commits.stage_for_commit(save)
    if active is not None:
        active.residency.unload()
    if visit.ends_epoch:
        timer = run.metrics.end_joint_epoch(len(run.workload.splits["train"]))
        if "val" in run.workload.splits:
            validate(run, f"epoch {visit.epochs_before + 1}")
        run.metrics.log_joint_epoch(visit.epochs_before + 1, timer)
    if visit.commits:
        run.commits.commit_if_due(nothing_changed)


class StepCounts:
    """Optimizer steps of a run's program, by partition.

    Args:
        run: the run; the steps of its sweeps are not counted, since they count for themselves.
    """

    def __init__(self, run: Run) -> None:
        self._steps = run.workload.steps
        self._total = [0] * len(run.plan.partitions)
        # Before each item of the program, of its own partition: in all, and in the same epoch, which may take several visits.
        self.before: list[int] = []
        self.before_in_epoch: list[int] = []
        at_epoch = list(self._total)
        samples = len(run.workload.splits["train"])
        for item in run.program:
            if isinstance(item, Sweep):
                self.before.append(0)
                self.before_in_epoch.append(0)
                continue
            if item.action == "learn" and item.begins_epoch:
                at_epoch[item.partition] = self._total[item.partition]
            self.before.append(self._total[item.partition])
            self.before_in_epoch.append(self._total[item.partition] - at_epoch[item.partition])
            if item.action == "learn":
                batch = run.plan.partitions[item.partition].batch
                self._total[item.partition] += item.epochs * steps_of_epoch(item, samples, batch)

    def of(self, partition: int) -> int:
        """Return the steps of all visits of a partition.

        Args:
            partition: number of the partition.
        """
        return self._steps(self._total[partition])


def steps_of_epoch(visit: Visit, samples: int, batch: int) -> int:
    """Return the optimizer steps of one epoch of a visit, whose last batch may be short.

    Args:
        visit: a `learn` visit.
        samples: training samples.
        batch: samples per step.
    """
    begin, end = visit.macro_batch or (0, samples)
    return math.ceil((end - begin) / batch)


def _sweep(run: Run, sweep: Sweep) -> bool:
    """Train all epochs of a sweep; return False if a batch did not fit, after which the weights are no commit's."""
    learner = SweepLearner(run, sweep)
    try:
        EpochLoop(run, learner).train()
    except SteppedInPart:
        return False
    finally:
        learner.close()
    return True


def _changed(sweep: Sweep) -> Sequence[int]:
    """Return the partitions that a sweep has changed: all of it is in the working files."""
    return sweep.changed


def _learn(run: Run, visit: Visit, active: ActivePartition, steps: StepCounts) -> bool:
    """Train all epochs of a visit; return False if a batch did not fit, after which the weights are no commit's."""
    if not active.residency.optimizers:
        run.session.display.message(f"{active.title} has only frozen weights: nothing to learn")
        return True
    following = next_partition(run.program, run.state.visit)
    weight_file = None if following is None else run.weights.newest_file(following)
    page_cache = PageCachePrefetch(weight_file, run.session.threads.read)
    with ExitStack() as stack:
        val = None
        if visit.from_synthetic_labels:
            # What it would be measured on are the very labels that it learns from.
            train = run.partitions.synthetic_label_loader(visit.partition)
        else:
            train = _training_samples(run, stack, visit)
            if (mixer := run.workload.mixer) is not None:
                train = MixedLoader(train, mixer, steps.before_in_epoch[run.state.visit])
            if "val" in run.workload.splits and visit.macro_batch is None:
                val = run.partitions.loader(stack, visit.partition, "val", _folder(run, "val"))
        try:
            steps_before = steps.before[run.state.visit]
            EpochLoop(run, PartitionLearner(run, visit, active, train, val, steps_before, page_cache)).train()
        except SteppedInPart:
            return False
    return True


def _emit(run: Run, visit: Visit, active: ActivePartition) -> None:
    """Write a partition's outputs for one part of the data, or one view of it."""
    config = run.workload.config
    # A store that a commit names is not written to: where blocks take several turns, each has stores of its own.
    turn = f"-{run.state.visit}" if config.visits != "sequential" or config.views > 1 else ""
    folder = run.commits.activations / f"b{visit.partition + 1:02d}-{visit.split}{turn}"
    # A macro-batch goes through all blocks first, to the next commit: a stop in it would lose what came before it too.
    on_micro_batch = run.commits.stop_if_asked if visit.commits else lambda: None
    with ExitStack() as stack:
        if visit.split == "train" and (visit.macro_batch is not None or config.views > 1):
            loader = _training_samples(run, stack, visit)
        else:
            loader = run.partitions.loader(stack, visit.partition, visit.split, _folder(run, visit.split))
        run.session.display.start_emit(active.title, visit.split, loader.num_samples)
        run.partitions.write_outputs(active, loader, folder, on_micro_batch=on_micro_batch, encoding=config.activation_dtype)
    run.replace_store(_store_key(visit.split, visit.view), folder.name)
    run.metrics.log_emit(visit)


def _training_samples(run: Run, stack: ExitStack, visit: Visit) -> Loader:
    """Open the training samples of a visit: an epoch's, a macro-batch of one, or those of a view."""
    config, partition, partitions = run.workload.config, visit.partition, run.partitions
    if visit.macro_batch is not None:
        loader = partitions.loader(stack, partition, "train", _folder(run, "train"))
        if partition > 0:
            return StoredMacroBatchLoader(loader)
        assert isinstance(loader, DatasetLoader)
        epoch = visit.epochs_before
        return MacroBatchLoader(loader, config.value_for("shuffle", 0), epoch, slice(*visit.macro_batch), ("epoch", epoch))
    if visit.action == "emit" and partition == 0:
        loader = partitions.loader(stack, partition, "train", None)
        assert isinstance(loader, DatasetLoader)
        return MacroBatchLoader(loader, False, 0, slice(None), ("view", visit.view))
    if partition == 0 or config.views == 1:
        return partitions.loader(stack, partition, "train", _folder(run, "train"))
    if visit.action == "emit":
        return partitions.loader(stack, partition, "train", _folder(run, "train", visit.view))
    views = ViewsLoader(lambda view: partitions.open_loader(partition, "train", _folder(run, "train", view)), config.views)
    stack.callback(views.close)
    return views


def _store_key(split: SplitName, view: int) -> str:
    """Return what the journal calls the store of a split, or of one of its views."""
    return f"{split}+{view}" if view else split


def _folder(run: Run, split: SplitName, view: int = 0) -> Path | None:
    """Return the store that a visit reads; None where it reads the data set."""
    name = run.store_of(_store_key(split, view))
    return None if name is None else run.commits.activations / name

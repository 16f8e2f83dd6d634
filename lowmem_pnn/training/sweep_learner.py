"""A sweep: all partitions train together, every batch going through all of them and back."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from lowmem_pnn.engine.epoch import first_batches
from lowmem_pnn.engine.loaders import DatasetLoader, Loader, MixedLoader
from lowmem_pnn.engine.out_of_memory import SteppedInPart, unless_out_of_memory
from lowmem_pnn.engine.stored_samples import StoredSampleLoader
from lowmem_pnn.evaluation.measure import validate
from lowmem_pnn.methods import Sweep
from lowmem_pnn.run.run import Run
from lowmem_pnn.stores.activations import ActivationStore, Batch
from lowmem_pnn.sweep.sweeper import Sweeper


class SweepLearner:
    """Trains all partitions of a sweep, epoch by epoch (see `lowmem_pnn.training.loop.EpochsLearner`).

    Args:
        run: the run, inside the sweep, with no partition resident.
        sweep: visits that every batch goes through.
    """

    action: Literal["learn", "sweep"] = "sweep"

    def __init__(self, run: Run, sweep: Sweep) -> None:
        workload, session = run.workload, run.session
        train = workload.splits["train"]
        self._run, self._sweep = run, sweep
        self._loader = _loader(run, sweep)
        self.partition = run.partitions.last
        self.title = "recovery" if sweep.phase == "recovery" else "all partitions"
        self.num_samples, self.smallest_batch = len(train), run.plan.smallest_micro_batch
        self.steps_per_epoch = math.ceil(len(train) / sweep.batch_size)
        self.num_epochs, self.epochs_before = sweep.epochs, sweep.epochs_before
        self.steps_before = sweep.epochs_before * self.steps_per_epoch
        self.is_joint = False
        self.may_learn_nothing = False
        self._total_steps = workload.steps((sweep.epochs_before + sweep.epochs + sweep.epochs_after) * self.steps_per_epoch)
        if sweep.frozen:
            assert workload.early is not None, "there is a frozen model to train"
            workload = workload.early
        self._objective = workload.objective(run.plan, run.partitions.last)
        self._sweeper = Sweeper(
            workload,
            run.plan,
            sweep,
            session.device,
            run.weights,
            session.threads,
            session.counter,
            session.rundir.path,
            self._total_steps,
            run.metrics.begin_record,
        )

    def count(self, batch: Batch) -> float:
        """See `Learner`; batches of which nothing counts are said, once."""
        return self._run.count_of(self._objective, batch[1])

    @property
    def micro_batch(self) -> int:
        """See `EpochsLearner`."""
        return self._run.state.sweep_micro_batch

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Batch, Batch | None]]:
        """See `Learner`; no batch is read before its turn, since the partitions take the memory."""
        sweep, loader, epoch = self._sweep, self._loader, self.epochs_before + epoch
        batches = loader.batches(
            sweep.batch_size, shuffle=sweep.shuffle, epoch=epoch, start=start, augmentation_key=(sweep.phase, epoch)
        )
        left = self._total_steps - epoch * self.steps_per_epoch - start
        return first_batches(_alone(self._run.session.threads.stalls.iterate(loader.stall_kind, batches)), left)

    def train_batch(self, batch: Batch, step: int, following: Batch | None) -> float:
        """See `Learner`."""
        scale, progress = self._run.state.loss_scales[-1], self._run.state.progress
        is_first = progress.epoch == 0 and not progress.tally.num_samples
        loss = unless_out_of_memory(
            lambda: self._sweeper.train_batch(batch, self.steps_before + step, self.micro_batch, scale, is_first=is_first)
        )
        if loss is None:
            raise SteppedInPart("memory ran out in a sweep, when later partitions may have been stepped")
        return loss

    def learning_rate(self, step: int) -> float:
        """See `EpochsLearner`."""
        return self._run.workload.learning_rate(self._sweep.learners[-1], step, self._total_steps)

    def after_batch(self, epoch: int, share: float) -> None:
        """See `EpochsLearner`: the sweeper's own stream prefetches."""

    def save(self) -> Sequence[int]:
        """See `EpochsLearner`: all that was stepped is on its way to the working files."""
        self._sweeper.finish_writes()
        return self._sweep.changed

    @property
    def measures_within_epochs(self) -> bool:
        """See `EpochsLearner`."""
        return True

    def validate(self, where: str) -> None:
        """See `EpochsLearner`."""
        self._run.metrics.end_record()
        self._sweeper.finish_writes()
        if "val" in self._run.workload.splits:
            self._sweeper.free_memory()
            validate(self._run, where)

    def close(self) -> None:
        """Free all memory, and give up what waits to be written."""
        self._sweeper.close()


def _loader(run: Run, sweep: Sweep) -> Loader:
    """Return what gives the batches of a sweep: the data set, or what the partitions before it have written once."""
    workload, session = run.workload, run.session
    config, pool = workload.config, session.threads.read
    if sweep.first == 0:
        train, augments = workload.splits["train"], workload.draws_anew
        loader = DatasetLoader(train, config.seed, pool, permuted=True, phase=sweep.phase, augments=augments)
        return loader if workload.mixer is None else MixedLoader(loader, workload.mixer)
    name = run.store_of("train")
    assert name is not None, "the visit before has written it"
    store = ActivationStore.open(run.commits.activations / name, counter=session.counter)
    return StoredSampleLoader(store, config.seed, pool, phase=sweep.phase)


def _alone(batches: Iterator[Batch]) -> Iterator[tuple[Batch, None]]:
    for batch in batches:
        yield batch, None
        del batch  # or two would be there while the next one is waited for

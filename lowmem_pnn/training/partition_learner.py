"""A `learn` visit: one resident partition trains on the samples at its boundary, against an objective of its own."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.epoch import first_batches
from lowmem_pnn.engine.loaders import Loader
from lowmem_pnn.errors import DivergedError
from lowmem_pnn.evaluation.measure import Measured, say_if_not_finite
from lowmem_pnn.methods import Visit
from lowmem_pnn.run.run import Run
from lowmem_pnn.stores.activations import Batch
from lowmem_pnn.training.page_cache import PageCachePrefetch


class PartitionLearner:
    """Trains the active partition, epoch by epoch (see `lowmem_pnn.training.loop.EpochsLearner`).

    Args:
        run: the run, inside the visit.
        visit: the `learn` visit.
        active: the partition.
        train: training samples at its boundary.
        val: validation samples there; None where the partition is not measured by itself.
        steps_before: optimizer steps of its earlier visits.
        page_cache: brings the next partition's weight file into the page cache during the last epoch.
    """

    action: Literal["learn", "sweep"] = "learn"

    def __init__(
        self,
        run: Run,
        visit: Visit,
        active: ActivePartition,
        train: Loader,
        val: Loader | None,
        steps_before: int,
        page_cache: PageCachePrefetch,
    ) -> None:
        self.partition, self.title = active.number, active.title
        self.num_samples, self.smallest_batch = train.num_samples, active.smallest_micro_batch
        self.steps_per_epoch = math.ceil(train.num_samples / active.batch_size)
        self.num_epochs, self.epochs_before, self.steps_before = visit.epochs, visit.epochs_before, steps_before
        self.is_joint = visit.macro_batch is not None
        self.may_learn_nothing = may_learn_nothing(run, visit)
        self._run, self._active, self._train, self._val = run, active, train, val
        self._executor, self._page_cache = run.partitions.executor, page_cache

    def count(self, batch: Batch) -> float:
        """See `Learner`; batches of which nothing counts are said, once."""
        return self._run.count_of(self._active.objective, batch[1])

    @property
    def micro_batch(self) -> int:
        """See `EpochsLearner`."""
        return self._active.micro_batch

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Batch, Batch | None]]:
        """See `Learner`."""
        self._active.train()
        active, epoch = self._active, self.epochs_before + epoch
        batches = self._train.batches(
            active.batch_size, shuffle=active.shuffle, epoch=epoch, start=start, augmentation_key=("epoch", epoch)
        )
        pairs = self._executor.over(self._train, batches)
        if (most := self._run.workload.config.max_steps) is None:
            return pairs
        return first_batches(pairs, most - epoch * self.steps_per_epoch - start)

    def train_batch(self, batch: Batch, step: int, following: Batch | None) -> float:
        """See `Learner`."""
        loss = self._executor.train_batch(self._active, batch, self.steps_before + step, following)
        if not math.isfinite(loss) and not self._active.loss_scale.moves:
            raise DivergedError(
                f"the loss became {loss} in {self.title}, epoch {self.epochs_before + step // self.steps_per_epoch + 1}, "
                f"batch {step % self.steps_per_epoch + 1}; the last commit is kept; {self._active.loss_scale.remedy}"
            )
        return loss

    def learning_rate(self, step: int) -> float:
        """See `EpochsLearner`."""
        return self._active.learning_rate(step)

    def after_batch(self, epoch: int, share: float) -> None:
        """See `EpochsLearner`."""
        if epoch == self.num_epochs - 1:
            self._page_cache.prefetch(share)

    def save(self) -> Sequence[int]:
        """See `EpochsLearner`."""
        return self._run.partitions.save(self._active)

    @property
    def measures_within_epochs(self) -> bool:
        """See `EpochsLearner`."""
        return self._active.is_last and self._val is not None

    def validate(self, where: str) -> None:
        """See `EpochsLearner`."""
        if self._val is None:
            return
        if self._active.is_last and not self._active.objective.per_layer_loss:
            measured = Measured(self._run)
            self._executor.forward(self._active, self._val, measured.of, measured.merge)
            measured.record(f"{self.title}, {where}")
            return
        *layers, whole = self._executor.measure(self._active, self._val)
        say_if_not_finite(self._run, whole, f"{self.title}, {where}")
        scored = (*layers, whole) if self._active.objective.per_layer_loss else ()
        self._run.record_validation(self.partition, whole, scored)
        self._run.record_losses(self.partition, scored)


def may_learn_nothing(run: Run, visit: Visit) -> bool:
    """Decide whether a visit may have no batch that can be learnt from, since the partition learns in others of the same epoch.

    Args:
        run: the run, inside the visit.
        visit: a `learn` visit.
    """
    if visit.macro_batch is None:
        return False
    if visit.macro_batch[1] < len(run.workload.splits["train"]):
        return True
    # The epoch's last macro-batch: those before it tell.
    tallies = run.state.epoch_tallies
    return not visit.begins_epoch and bool(tallies) and tallies[visit.partition].num_samples > 0

"""One epoch of training, batch by batch: the innermost loop of every method, from wherever its progress says."""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

from lowmem_pnn.engine.tally import EpochProgress
from lowmem_pnn.errors import DataError
from lowmem_pnn.stores.activations import Batch


class Learner(Protocol):
    """What learns in an epoch: one resident partition, or all partitions in turn."""

    title: str
    """What learns, in words."""

    num_samples: int
    """Samples of an epoch."""

    steps_per_epoch: int
    """Batches of an epoch, a short last one included."""

    smallest_batch: int
    """Samples that the modules need at once; a last batch of fewer is left out."""

    may_learn_nothing: bool
    """Whether an epoch may have no batch that can be learnt from: other visits have their share in it."""

    def count(self, batch: Batch) -> float:
        """Return what a batch's mean loss is over; where nothing in it counts there is nothing to learn, and no step."""
        ...

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Batch, Batch | None]]:
        """Iterate over an epoch's batches, each with the one after it where that is there already.

        Args:
            epoch: number of the epoch in the present visit or sweep, from 0.
            start: batches to skip.
        """
        ...

    def train_batch(self, batch: Batch, step: int, following: Batch | None) -> float:
        """Take one optimizer step, and return the batch's mean loss; in fp16 one that is not finite had its step left out.

        Args:
            batch: boundary tensors (B, ...) and labels (B, ...), on the host.
            step: optimizer steps of the present visit or sweep before it.
            following: the batch after it, where it is there already.

        Raises:
            SteppedInPart: memory ran out after some of the weights were stepped.
            BudgetError: not even the smallest micro-batch fits.
            DivergedError: the loss became NaN or infinite.
        """
        ...


def first_batches(batches: Iterator[tuple[Batch, Batch | None]], count: int) -> Iterator[tuple[Batch, Batch | None]]:
    """Iterate over the first batches of an epoch, the last of which none follows.

    Args:
        batches: batches, each with the one after it where that is there already.
        count: number of them that are wanted.
    """
    if count <= 0:
        return
    for batch, following in batches:
        count -= 1
        yield batch, following if count else None
        del batch, following  # or two would be there while the next one is waited for
        if not count:
            return


def train_epoch(
    learner: Learner, progress: EpochProgress, after_batch: Callable[[float | None], None], until: int | None = None
) -> bool:
    """Train over one epoch's samples, or some of them.

    Args:
        learner: what learns.
        progress: how far the epoch is; moved on after every batch, and at the end to the next epoch's begin.
        after_batch: called after every batch with its loss (None if the batch, or its step, was left out), when `progress`, weights and
            optimizer state belong together.
        until: number of the batch to end before, or None. Then no batch is held any more, and the epoch may be gone on with.

    Returns:
        Whether the epoch is over.

    Raises:
        SteppedInPart: memory ran out, and only a commit can be gone back to.
        BudgetError: not even the smallest micro-batch fits.
        DivergedError: the loss became NaN or infinite.
        CaptureError: a parameter got no gradient.
        DataError: there are fewer samples than the modules need at once, or nothing in any batch counts.
    """
    loss = None
    for batch, following in learner.batches(progress.epoch, progress.batch):
        loss = None
        if (
            len(batch[1]) >= learner.smallest_batch and (count := learner.count(batch)) > 0
        ):  # a last batch of 1 tells BatchNorm nothing
            loss = learner.train_batch(batch, progress.epoch * learner.steps_per_epoch + progress.batch, following)
            if math.isfinite(loss):
                progress.tally.add(loss, len(batch[1]), count)
        progress.batch += 1
        del batch, following
        after_batch(loss if loss is not None and math.isfinite(loss) else None)
        if progress.batch == until != learner.steps_per_epoch:
            return False
    if not progress.tally.num_samples and loss is None and not learner.may_learn_nothing:
        raise DataError(
            f"{learner.num_samples} training samples make no batch that {learner.title} can learn from: the modules need at least "
            f"{learner.smallest_batch} samples at once, and a label that counts; give more samples, or labels"
        )
    progress.epoch += 1
    progress.batch = 0
    return True

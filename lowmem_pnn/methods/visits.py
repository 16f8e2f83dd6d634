"""Visits and sweeps: the steps of a training program, as plain data."""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Visit:
    """One partition, resident on the device, doing one thing with some samples.

    Args:
        action: What the partition does. `learn`: run epochs over the samples against the partition's own objective. `emit`: run the
            samples forward without gradients and write the activations of the next boundary. `backpropagate`: run forward once more
            and then backward, from the gradient that the next partition left (or from the loss), and leave a gradient for the
            previous partition. `step`: apply kept gradients. `join`: take over the partitions that other processes have trained.
            `meta`: train the meta model of the whole, of which every partition has a thin part.
        partition: Number of the partition in the plan.
        split: Split of the data that the samples are from; the visits of a sweep get batches of it.
        epochs: Passes over the samples (`learn`).
        epochs_before: Passes over the samples in the partition's earlier visits (`learn`).
        macro_batch: First position, and the position after the last, of the samples in the order of the epoch; None for all samples.
        view: Number of the augmented copy of the samples that is written (`emit`).
        commits: Whether the run can be resumed from the end of this visit; else only from the end of an earlier one.
        ends_epoch: Whether an epoch in which all partitions took turns is over at the end of this visit: the whole model is evaluated, where
            there is a validation split.
        from_synthetic_labels: Whether the inputs are the synthetic labels of the boundary before the partition, instead of
            activations (`learn`).
        thin: Whether a meta model takes part: `emit` runs the partition's thin part in its place, and the loss of `learn` goes through the
            thin parts of the partitions after it.
        learns: Whether the partition learns in a sweep: it is in train mode, updates its buffers and steps. Else the partition is
            frozen, in eval mode unless `trains`.
        trains: Whether a partition that does not learn is in train mode although frozen, as in plain PyTorch.
        keeps_buffers: Whether the buffers that a forward has changed are kept, since the partition runs but once (`emit`).
        returns_input_gradient: Whether the gradient of the partition's inputs is computed, for an earlier partition that learns.
        keeps_gradients: Whether gradients are kept for a later `step` visit, instead of being applied at once (`backpropagate`).
        frozen: Whether what is to be unfrozen later is frozen yet (`learn`).
    """

    action: Literal["learn", "emit", "backpropagate", "step", "join", "meta"]
    partition: int
    split: SplitName
    epochs: int = 1
    epochs_before: int = 0
    macro_batch: tuple[int, int] | None = None
    view: int = 0
    commits: bool = True
    ends_epoch: bool = False
    from_synthetic_labels: bool = False
    thin: bool = False
    learns: bool = False
    trains: bool = False
    keeps_buffers: bool = False
    returns_input_gradient: bool = False
    keeps_gradients: bool = False
    frozen: bool = False

    @property
    def begins_epoch(self) -> bool:
        """Whether no samples of the visit's first epoch come before its own in the partition."""
        return self.macro_batch is None or self.macro_batch[0] == 0

    @property
    def epochs_learnt(self) -> int:
        """Passes over the samples in which the partition learns."""
        return self.epochs if self.action == "learn" else 0

    def unfrozen_at(self, epoch: int) -> tuple["Visit", "Visit"]:
        """Return the visit as two: one of the epochs in which what is unfrozen later is frozen, and one of the others.

        Args:
            epoch: Epoch that is the first of the others, from 0.
        """
        first = dataclasses.replace(self, epochs=epoch, frozen=True)
        return first, dataclasses.replace(self, epochs=self.epochs - epoch, epochs_before=epoch)


@dataclass(frozen=True)
class Sweep:
    """Visits that every batch of an epoch goes through, one after the other: the gradient crosses partitions.

    Args:
        visits: Visits of one batch, in order.
        epochs: Passes over the samples.
        batch_size: Samples of an optimizer step.
        phase: Word that seeds the data order and all random choices: `epoch` for training from the start (as `backprop` does),
            `recovery` for the epochs after it.
        fresh_state: Whether the first step begins with a new optimizer state, whatever earlier visits have left; a batch in which nothing
            counts takes no step.
        shuffle: Whether every epoch has a data order of its own.
        epochs_before: Epochs of the sweeps before, whose training this one goes on with.
        epochs_after: Epochs of the sweeps that go on with this one's training.
        frozen: Whether what is to be unfrozen later is frozen yet.
    """

    visits: tuple[Visit, ...]
    epochs: int
    batch_size: int
    phase: Literal["epoch", "recovery"] = "epoch"
    fresh_state: bool = False
    shuffle: bool = True
    epochs_before: int = 0
    epochs_after: int = 0
    frozen: bool = False

    @property
    def epochs_learnt(self) -> int:
        """Passes over the samples: all of them are learnt from."""
        return self.epochs

    def unfrozen_at(self, epoch: int) -> tuple["Sweep", "Sweep"]:
        """Return the sweep as two: one of the epochs in which what is unfrozen later is frozen, and one of the others.

        Args:
            epoch: Epoch that is the first of the others, from 0.
        """
        first = dataclasses.replace(self, epochs=epoch, epochs_after=self.epochs - epoch, frozen=True)
        return first, dataclasses.replace(self, epochs=self.epochs - epoch, epochs_before=epoch)

    @property
    def learners(self) -> tuple[int, ...]:
        """Numbers of the partitions that learn, ascending."""
        return tuple(sorted({visit.partition for visit in self.visits if visit.learns}))

    @property
    def first(self) -> int:
        """Number of the first partition that a batch goes through; those before it have written their outputs once."""
        return min(visit.partition for visit in self.visits)

    @property
    def changed(self) -> tuple[int, ...]:
        """Numbers of the partitions whose weights or buffers change, ascending."""
        return tuple(sorted({visit.partition for visit in self.visits if visit.learns or visit.keeps_buffers}))


def sweep_visits(
    num_partitions: int,
    learners: Sequence[int],
    *,
    deferred: bool,
    updaters: Collection[int] = (),
    trains: bool = False,
) -> tuple[Visit, ...]:
    """Return the visits of one batch in exact training, or in recovery.

    Args:
        num_partitions: Number of partitions in the plan.
        learners: Numbers of the partitions that learn, at least one; the others are frozen.
        deferred: Whether all gradients are kept until the last one is complete, and applied by `step` visits.
        updaters: Numbers of the frozen partitions whose forward changes their buffers.
        trains: Whether frozen partitions are in train mode.

    Returns:
        Forward through all partitions but the last, back from the last partition to the first that learns, then the steps. Partitions
        before the first that learns run but once.

    Example:
        >>> [(visit.action, visit.partition) for visit in sweep_visits(3, [1], deferred=False)]
        [('emit', 0), ('emit', 1), ('backpropagate', 2), ('backpropagate', 1)]
    """
    first = min(learners)
    moving = {*learners, *(number for number in updaters if number > first)}

    def frozen_in_train_mode(number: int) -> bool:
        return trains and number not in moving

    forward = [
        Visit(
            "emit",
            number,
            "train",
            learns=number in moving,
            trains=frozen_in_train_mode(number),
            keeps_buffers=number < first and number in updaters,
        )
        for number in range(num_partitions - 1)
    ]
    back = [
        Visit(
            "backpropagate",
            number,
            "train",
            learns=number in moving,
            trains=frozen_in_train_mode(number),
            returns_input_gradient=number > first,
            keeps_gradients=deferred and number in learners,
        )
        for number in reversed(range(first, num_partitions))
    ]
    steps = [Visit("step", number, "train", learns=True) for number in sorted(learners)] if deferred else []
    return (*forward, *back, *steps)


def evaluation_visits(num_partitions: int, split: SplitName = "test") -> list[Visit]:
    """Return the visits that evaluate a trained model: each partition once, forward."""
    return [Visit("emit", partition, split) for partition in range(num_partitions)]

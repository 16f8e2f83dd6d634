"""A stage: a resident partition and how it is worked on; how far its work is, and what was measured of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from lowmem_pnn.arrivals import late_names
from lowmem_pnn.methods import Objective
from lowmem_pnn.numerics import LossScale
from lowmem_pnn.residency import Residency


@dataclass
class Tally:
    """A running mean of the loss, and a count of right answers."""

    loss_sum: float = 0.0
    num_correct: int | None = None
    num_samples: int = 0

    def add(self, mean_loss: float, num_samples: int, num_correct: int | None = None) -> None:
        """Count a batch."""
        self.loss_sum += mean_loss * num_samples
        self.num_samples += num_samples
        if num_correct is not None:
            self.num_correct = (self.num_correct or 0) + num_correct

    @property
    def loss(self) -> float:
        """The mean over all samples so far."""
        return self.loss_sum / max(1, self.num_samples)

    @property
    def accuracy(self) -> float | None:
        """The share of right answers, or None where none were counted."""
        return None if self.num_correct is None else self.num_correct / max(1, self.num_samples)


@dataclass
class Progress:
    """How far a `learn` visit is: all that a resume needs to go on inside it."""

    epoch: int = 0
    batch: int = 0
    tally: Tally = field(default_factory=Tally)


@dataclass
class Stage:
    """A resident partition and how it is worked on.

    Args:
        number: the partition's, in the plan.
        title: for messages: its number and layers.
        residency: loaded.
        objective: prepared.
        batch_size: samples a step.
        micro_batch: samples on the device at once; halves when they do not fit.
        smallest_micro_batch: what the modules accept at least.
        is_last: whether its outputs are class scores.
        learning_rate: of a step, counted from 0.
        loss_scale: moved on with every step.
        clip_norm: norm that the partition's gradients are scaled down to, or None.
        chunk_rows: rows for which the last layer and the loss are computed at once, or None for all.
        shuffle: every epoch has an order of its own.
        steps_in_backward: layers step as soon as their gradients are whole, where a batch goes through at once.
    """

    number: int
    title: str
    residency: Residency
    objective: Objective
    batch_size: int
    micro_batch: int
    smallest_micro_batch: int
    is_last: bool
    learning_rate: Callable[[int], float]
    loss_scale: LossScale = field(default_factory=LossScale)
    clip_norm: float | None = None
    chunk_rows: int | None = None
    shuffle: bool = True
    steps_in_backward: bool = True

    @cached_property
    def late(self) -> frozenset[str]:
        """Parameters whose gradients come from more than one backward of a micro-batch."""
        return late_names(
            self.residency.layers,
            self.residency.name_of,
            by_units=self.objective.by_units,
            in_chunks=self.is_last and self.chunk_rows is not None,
        )

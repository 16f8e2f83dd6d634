"""A stage: a resident partition and how it is worked on; how far its work is, and what was measured of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from lowmem_pnn.engine.optimizer_in_backward import after_backward_names
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.methods import Objective
from lowmem_pnn.model.precision import LossScale


@dataclass
class ActivePartition:
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
        return after_backward_names(
            self.residency.layers,
            self.residency.name_of,
            per_layer_loss=self.objective.per_layer_loss,
            in_chunks=self.is_last and self.chunk_rows is not None,
        )

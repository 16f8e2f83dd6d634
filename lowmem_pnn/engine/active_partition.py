"""The active partition: the one that is resident, with everything that says how it is trained or run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from lowmem_pnn.engine.optimizer_in_backward import after_backward_names
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.methods import Objective
from lowmem_pnn.model.precision import LossScale


@dataclass
class ActivePartition:
    """The partition that is resident, and how it is trained or run.

    Args:
        number: number of the partition in the plan, from 0.
        title: number and layers of the partition, for messages.
        residency: loaded tensors.
        objective: prepared objective.
        batch_size: samples per optimizer step.
        micro_batch: samples on the device at once; halved when they do not fit.
        samples_at_once: samples that are read at once where nothing learns.
        smallest_micro_batch: samples that the modules accept at least.
        may_shrink: whether the micro-batch may be halved.
        is_last: whether the partition's outputs are class scores.
        learning_rate: learning rate of a step, which is counted from 0; given `base` too, of parameters whose own rate that is.
        loss_scale: factor on the loss, moved on with every step.
        clip_norm: norm that gradients are scaled down to (of each layer, where each learns by a loss of its own), or None.
        chunk_rows: rows for which the last layer and the loss are computed at once, or None for all.
        shuffle: whether every epoch has an order of its own.
        is_thin: whether a thin part of a meta model is there in the partition's place.
        is_frozen_yet: whether what is to be unfrozen later is frozen in it yet.
        steps_in_backward: whether layers step as soon as their gradients are complete, where a batch goes through at once.
    """

    number: int
    title: str
    residency: Residency
    objective: Objective
    batch_size: int
    micro_batch: int
    samples_at_once: int
    smallest_micro_batch: int
    is_last: bool
    learning_rate: Callable[..., float]
    loss_scale: LossScale = field(default_factory=LossScale)
    clip_norm: float | None = None
    chunk_rows: int | None = None
    shuffle: bool = True
    is_thin: bool = False
    is_frozen_yet: bool = False
    steps_in_backward: bool = True
    may_shrink: bool = True

    @cached_property
    def after_backward(self) -> frozenset[str]:
        """Names of the parameters whose gradients come from more than one backward of a micro-batch."""
        return after_backward_names(
            self.residency.layers,
            self.residency.chain.owner_of,
            per_layer_loss=self.objective.per_layer_loss,
            in_chunks=self.is_last and self.chunk_rows is not None,
        )

    def train(self) -> None:
        """Bring the modules into train mode."""
        for layer in self.residency.layers:
            layer.train()

    def eval(self) -> None:
        """Bring the modules into eval mode."""
        for layer in self.residency.layers:
            layer.eval()

    def drop_gradients(self) -> None:
        """Free the gradients of all parameters that learn."""
        for parameter in self.residency.trainable.values():
            parameter.grad = None

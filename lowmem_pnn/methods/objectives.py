"""Objectives: the loss of a partition, and the device memory that the loss needs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.profiling.costs import Affine
from lowmem_pnn.tasks.task import Task


class Objective(ABC):
    """The loss that a partition learns from."""

    per_layer_loss: ClassVar[bool] = False
    """Whether every layer of the partition has class scores and a loss of its own, and no gradient passes between layers."""

    @abstractmethod
    def prepare(self, device: torch.device) -> None:
        """Make the tensors that the loss needs on the device; called once per residency."""

    @abstractmethod
    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Return the mean loss over a micro-batch.

        Args:
            outputs: Boundary tensors of the partition, each (B, ...).
            labels: Targets (B, ...), as they are kept.

        Returns:
            A scalar that can be differentiated.
        """

    def shares(self, labels: Tensor, parts: Sequence[slice]) -> list[float]:
        """Return the weights of a batch's micro-batches, by which their mean losses add up to that of the batch.

        Args:
            labels: Targets of the batch, (B, ...), on the host.
            parts: Ranges of its samples.
        """
        return [(part.stop - part.start) / len(labels) for part in parts]

    def count(self, labels: Tensor) -> float:
        """Return what the mean loss of a micro-batch is a mean over, to weigh it among others."""
        return len(labels)

    def num_correct(self, outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[int, int] | None:
        """Return how many answers are right, and of how many; None where the outputs are no answers."""
        return None

    @abstractmethod
    def memory(self, output_bytes: int) -> Affine:
        """Return the device memory of the loss, in bytes, without the outputs and their gradient.

        Args:
            output_bytes: Bytes of the partition's outputs per sample, in float32 or wider.
        """


class TaskObjective(Objective):
    """The task's own loss, against the true targets.

    Args:
        task: Task of the run.
        outputs: Output tensors that the loss is taken of; the model's.
    """

    def __init__(self, task: Task, outputs: tuple[TensorSpec, ...]) -> None:
        self.task, self._outputs = task, outputs

    def prepare(self, device: torch.device) -> None:
        """Do nothing: the loss needs no tensors of its own."""

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Return the task's mean loss, as in training where an output has a gradient."""
        return self.task.loss(outputs, labels, training=any(output.requires_grad for output in outputs))

    def loss_of_rows(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses of some rows (R, ...) of a micro-batch that is computed in chunks."""
        return self.task.loss_of_rows(rows, labels, training=rows.requires_grad)

    def shares(self, labels: Tensor, parts: Sequence[slice]) -> list[float]:
        """See `Objective.shares`: by what counts in each."""
        return self.task.shares(labels, parts, self._outputs)

    def count(self, labels: Tensor) -> float:
        """See `Objective.count`."""
        return self.task.count(labels)

    def num_correct(self, outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[int, int] | None:
        """See `Objective.num_correct`."""
        return self.task.num_correct(outputs, labels)

    def memory(self, output_bytes: int) -> Affine:
        """Return the bytes of what the loss makes of the outputs, and of its gradient."""
        return self.task.memory(output_bytes)


class NoObjective(Objective):
    """No loss: the partition's gradient comes from the next partition."""

    def prepare(self, device: torch.device) -> None:
        """Do nothing: there is no loss."""

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Refuse: only the last partition of a sweep has a loss."""
        raise AssertionError("only the last partition of a sweep has a loss")

    def memory(self, output_bytes: int) -> Affine:
        """Return nothing: the incoming gradient is counted with the partition's last layer."""
        return Affine(0, 0)

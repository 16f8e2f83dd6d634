"""The words of every method: a visit, and the objective of the partition that learns in it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lowmem_pnn.chain import TensorSpec
from lowmem_pnn.config import FitConfig
from lowmem_pnn.costs import Affine

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Visit:
    """One partition, resident, over one part of the data, doing one thing.

    Args:
        action: `learn` runs epochs over the samples against the partition's objective; `emit` runs them forward once, in eval mode,
            and writes the next boundary's activations (or, at the end of the chain, measures the outputs).
        partition: its number in the plan.
        split: which part of the data.
        epochs: passes over the samples; 1 for `emit`.
    """

    action: Literal["learn", "emit"]
    partition: int
    split: Split
    epochs: int = 1


class Objective(ABC):
    """What a partition's outputs are measured against."""

    @abstractmethod
    def prepare(self, device: torch.device) -> None:
        """Make what the loss needs, on the device; called once per residency."""

    @abstractmethod
    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """The mean loss over a micro-batch.

        Args:
            outputs: the partition's boundary tensors, each (B, ...).
            labels: (B,) int64 class numbers.

        Returns:
            A scalar that can be differentiated.
        """

    def num_correct(self, outputs: tuple[Tensor, ...], labels: Tensor) -> int | None:
        """How many samples are classified rightly, or None where the outputs are no class scores."""
        return None

    @abstractmethod
    def memory(self, output_bytes: int) -> Affine:
        """Device bytes that the objective needs besides outputs and their gradient.

        Args:
            output_bytes: of the partition's outputs, per sample.
        """


class Labels(Objective):
    """Cross entropy against the true labels, over class scores (B, classes)."""

    def prepare(self, device: torch.device) -> None:
        """Nothing to make."""

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Mean cross entropy."""
        return nn.functional.cross_entropy(outputs[0], labels)

    def num_correct(self, outputs: tuple[Tensor, ...], labels: Tensor) -> int:
        """Samples whose highest score is their label's."""
        return int((outputs[0].argmax(1) == labels).sum())

    def memory(self, output_bytes: int) -> Affine:
        """Log probabilities, and their gradient."""
        return Affine(0, 2 * output_bytes)


class Method(ABC):
    """A method, for one configuration."""

    def __init__(self, config: FitConfig) -> None:
        self.config = config

    @property
    def num_partitions(self) -> int | None:
        """How many partitions the method asks for, or None to leave it to the planner."""
        return self.config.partitions

    @abstractmethod
    def visits(self, num_partitions: int, splits: Sequence[Split]) -> list[Visit]:
        """The training, as data.

        Args:
            num_partitions: of the plan.
            splits: the parts of the training data: `train`, and `val` where there is one.
        """

    @abstractmethod
    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], num_classes: int) -> Objective:
        """What a partition learns.

        Args:
            partition: its number.
            num_partitions: of the plan.
            boundary: the partition's output tensors.
            num_classes: of the data.
        """


def evaluation(num_partitions: int, split: Split = "test") -> list[Visit]:
    """The visits that measure a trained model: each partition once, forward."""
    return [Visit("emit", partition, split) for partition in range(num_partitions)]

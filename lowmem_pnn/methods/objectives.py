"""Objectives: the loss of a partition, and the device memory that the loss needs."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lowmem_pnn.profiling.costs import Affine


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
            labels: Class numbers (B,), int64.

        Returns:
            A scalar that can be differentiated.
        """

    def num_correct(self, outputs: tuple[Tensor, ...], labels: Tensor) -> int | None:
        """Return the number of correctly classified samples; None where the outputs are no class scores."""
        return None

    @abstractmethod
    def memory(self, output_bytes: int) -> Affine:
        """Return the device memory of the loss, in bytes, without the outputs and their gradient.

        Args:
            output_bytes: Bytes of the partition's outputs per sample, in float32 or wider.
        """


class Labels(Objective):
    """Mean cross entropy against the true labels, over class scores (B, classes), or (B, T, classes) for tokens.

    Args:
        label_smoothing: Smoothing of the labels in training (Szegedy et al. 2016, section 7); evaluation has none.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self._label_smoothing = label_smoothing

    def prepare(self, device: torch.device) -> None:
        """Do nothing: the loss needs no tensors of its own."""

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Return the cross entropy; `reduction="sum"` is for a micro-batch that is computed in chunks."""
        smoothing = self._label_smoothing if outputs[0].requires_grad else 0.0
        scores = at_least_float32(outputs[0]).flatten(0, -2)
        return nn.functional.cross_entropy(scores, labels.flatten(), reduction=reduction, label_smoothing=smoothing)

    def num_correct(self, outputs: tuple[Tensor, ...], labels: Tensor) -> int:
        """Return the number of samples (or tokens) whose highest score is that of their label."""
        return int((outputs[0].argmax(-1) == labels).sum())

    def memory(self, output_bytes: int) -> Affine:
        """Return the bytes of the log probabilities and of their gradient."""
        return Affine(0, 2 * output_bytes)


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


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or wider: losses are not computed in lower precision."""
    return tensor if tensor.dtype.itemsize >= torch.float32.itemsize else tensor.float()

"""Scores of a trained model on a data set: loss, accuracy, macro F1."""

import numpy as np
import torch
from torch import Tensor, nn


class Scores:
    """Collects outputs micro-batch by micro-batch; keeps counts only."""

    def __init__(self) -> None:
        self._loss_sum = 0.0
        # For each class: samples that have it, samples that were given it, and samples that rightly were.
        self._counts = np.zeros((3, 0), dtype=np.int64)

    def add(self, outputs: tuple[Tensor, ...], labels: Tensor) -> None:
        """Count a micro-batch.

        Args:
            outputs: one tensor of class scores, (B, classes or more).
            labels: (B,) int64, on the host.
        """
        (scores,) = outputs
        on_device = labels.to(scores.device)
        self._loss_sum += float(nn.functional.cross_entropy(scores.float(), on_device, reduction="sum"))
        predicted = scores.argmax(1).to("cpu", torch.int64)
        if self._counts.shape[1] == 0:
            self._counts = np.zeros((3, scores.shape[1]), dtype=np.int64)
        for counts, numbers in zip(self._counts, (labels, predicted, labels[labels == predicted]), strict=True):
            counts += np.bincount(numbers.numpy(), minlength=len(counts))

    def result(self) -> dict[str, float]:
        """`test_loss` (mean cross entropy), `test_accuracy` and `test_f1` (macro, over the classes that occur or were predicted)."""
        # Not scikit-learn's: importing it here would take memory out of the budget, at the very end of a run.
        actual, predicted, right = self._counts
        occurs = (actual + predicted) > 0
        total = int(actual.sum())
        return {
            "test_loss": self._loss_sum / total,
            "test_accuracy": int(right.sum()) / total,
            "test_f1": float((2 * right[occurs] / (actual + predicted)[occurs]).mean()),
        }

"""Scores of a trained model on a data set: loss, accuracy, macro F1."""

import numpy as np
import torch
from torch import Tensor, nn


class Scores:
    """Collects outputs micro-batch by micro-batch; keeps class numbers only."""

    def __init__(self) -> None:
        self._loss_sum = 0.0
        self._predicted: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, outputs: tuple[Tensor, ...], labels: Tensor) -> None:
        """Count a micro-batch.

        Args:
            outputs: one tensor of class scores, (B, classes or more).
            labels: (B,) int64, on the host.
        """
        (scores,) = outputs
        on_device = labels.to(scores.device)
        self._loss_sum += float(nn.functional.cross_entropy(scores.float(), on_device, reduction="sum"))
        self._predicted.append(scores.argmax(1).to("cpu", torch.int64).numpy().copy())
        self._labels.append(labels.numpy().copy())

    def result(self) -> dict[str, float]:
        """`test_loss` (mean cross entropy), `test_accuracy` and `test_f1` (macro, over the classes that occur)."""
        from sklearn.metrics import f1_score

        predicted, labels = np.concatenate(self._predicted), np.concatenate(self._labels)
        return {
            "test_loss": self._loss_sum / len(labels),
            "test_accuracy": float((predicted == labels).mean()),
            "test_f1": float(f1_score(labels, predicted, average="macro")),
        }

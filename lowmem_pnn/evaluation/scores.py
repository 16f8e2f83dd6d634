"""Scores of a trained model on a data set: loss, accuracy, macro F1; of a language model loss and perplexity."""

import math

import numpy as np
import torch
from torch import Tensor, nn


class Scores:
    """Collects outputs micro-batch by micro-batch; keeps counts only.

    Args:
        tokens: every token has a label: outputs are scores of the token that comes next.
    """

    def __init__(self, tokens: bool = False) -> None:
        self._tokens = tokens
        self._loss_sum = 0.0
        self._num_labels = 0
        # For each class: samples that have it, samples that were given it, and samples that rightly were.
        self._counts = np.zeros((3, 0), dtype=np.int64)

    def add(self, outputs: tuple[Tensor, ...], labels: Tensor) -> None:
        """Count a micro-batch.

        Args:
            outputs: one tensor of class scores, (B, classes or more), or of tokens, (..., tokens or more): whole samples, or any
                number of rows.
            labels: (B,), or (...) as the outputs have it; int64, on the host.
        """
        (scores,) = outputs
        if self._tokens:
            scores, labels = scores.flatten(0, -2), labels.flatten()
        on_device = labels.to(scores.device)
        self._loss_sum += float(nn.functional.cross_entropy(scores.float(), on_device, reduction="sum"))
        self._num_labels += len(labels)
        if self._tokens:
            return
        predicted = scores.argmax(1).to("cpu", torch.int64)
        if self._counts.shape[1] == 0:
            self._counts = np.zeros((3, scores.shape[1]), dtype=np.int64)
        for counts, numbers in zip(self._counts, (labels, predicted, labels[labels == predicted]), strict=True):
            counts += np.bincount(numbers.numpy(), minlength=len(counts))

    def merge(self, other: "Scores") -> None:
        """Count what another one has counted."""
        self._loss_sum += other._loss_sum
        self._num_labels += other._num_labels
        if self._counts.shape[1] == 0:
            self._counts = np.zeros_like(other._counts)
        self._counts += other._counts

    def result(self) -> dict[str, float]:
        """`test_loss` (mean cross entropy), and what tells how good that is.

        Returns:
            With it `test_accuracy` and `test_f1` (macro, over the classes that occur or were predicted); of tokens `perplexity`,
            the exponential of the loss.
        """
        loss = self._loss_sum / self._num_labels
        if self._tokens:
            # Above that a float overflows.
            return {"test_loss": loss, "perplexity": math.exp(loss) if loss < 709 else math.inf}
        # Not scikit-learn's: importing it here would take memory out of the budget, at the very end of a run.
        actual, predicted, right = self._counts
        occurs = (actual + predicted) > 0
        return {
            "test_loss": loss,
            "test_accuracy": int(right.sum()) / self._num_labels,
            "test_f1": float((2 * right[occurs] / (actual + predicted)[occurs]).mean()),
        }

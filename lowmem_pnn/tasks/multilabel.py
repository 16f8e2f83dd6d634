"""Multi-label classification: several labels of a sample may hold, each by a binary cross entropy of its own."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks.scores import Scores
from lowmem_pnn.tasks.task import Task, at_least_float32

# Places between the lowest and the highest logit at which precision and recall are counted. They are as close as 0.001 at 0, and grow apart
# with the logit, by 1 % of it: what is rare has logits far below 0 alone, whose probabilities would all be at one place.
_BINS = 2000
_MOST = 100.0
_EVEN_TO = 0.1


class MultiLabel(Task):
    """Mean binary cross entropy of logits (B, labels) against 0 and 1, as `nn.BCEWithLogitsLoss` has it.

    Args:
        targets: Form of the targets.
        label_smoothing: Share by which targets in training are drawn to 1/2; measures have none.
        class_weights: Weight of the samples that have a label, for each label (`pos_weight`); None for equal ones.
        output: Number of the model's output tensor that the loss is taken of.
    """

    name = "multilabel"

    def __init__(
        self, targets: Targets, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None, *, output: int = 0
    ) -> None:
        super().__init__(targets, output)
        self._label_smoothing = label_smoothing
        self.class_weights = tuple(class_weights or ())
        self._weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    @property
    def head_size(self) -> int:
        """Number of labels."""
        return self.targets.num_classes

    def misfit(self, outputs: tuple[TensorSpec, ...]) -> str | None:
        """See `Task.misfit`."""
        if outputs[self.output].shape == self.targets.shape:
            return None
        return f"{self.targets.num_classes} labels; it should give (batch, {self.targets.num_classes})"

    def loss(self, outputs: tuple[Tensor, ...], targets: Tensor, *, training: bool) -> Tensor:
        """See `Task.loss`."""
        smoothing = self._label_smoothing if training else 0.0
        if smoothing:
            targets = targets * (1 - smoothing) + smoothing / 2
        weights = None if self._weights is None else self._weights.to(targets.device)
        return nn.functional.binary_cross_entropy_with_logits(at_least_float32(outputs[self.output]), targets, pos_weight=weights)

    def num_correct(self, outputs: tuple[Tensor, ...], targets: Tensor) -> tuple[int, int]:
        """Return how many labels are rightly given or not given, and of how many."""
        return int(((outputs[self.output] > 0) == (targets > 0.5)).sum()), targets.numel()

    def task_score_names(self, outputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
        """See `Task.task_score_names`."""
        return ("loss", "accuracy", "f1", "average_precision")

    def task_scores(self) -> "LabelScores":
        """See `Task.task_scores`."""
        return LabelScores(self)


class LabelScores(Scores):
    """Loss, accuracy, macro F1 and mean average precision of labels.

    Args:
        task: What is measured.
    """

    def __init__(self, task: MultiLabel) -> None:
        super().__init__()
        self._task = task
        # Samples without and with each label, by the score that they were given.
        self._counts = np.zeros((2, task.head_size, _BINS), dtype=np.int64)

    def add(self, outputs: tuple[Tensor, ...], targets: Tensor) -> None:
        """See `Scores.add`."""
        self._add_loss(
            float(self._task.loss(outputs, targets.to(outputs[self._task.output].device), training=False)), len(targets)
        )
        # Logits of 0 and below to the lower half, so that a label is given from the middle on.
        logits = outputs[self._task.output].double().cpu().nan_to_num(nan=-_MOST).clamp(-_MOST, _MOST)
        scaled = (torch.asinh(logits / _EVEN_TO) / math.asinh(_MOST / _EVEN_TO) + 1) * (_BINS / 2)
        places = (
            torch.where(logits > 0, scaled.floor().clamp(_BINS // 2, _BINS - 1), scaled.ceil() - 1).clamp(0, _BINS - 1).long()
        )
        has = targets > 0.5
        labels = torch.arange(self._task.head_size).expand_as(places)
        for number, chosen in enumerate((~has, has)):
            flat = (labels * _BINS + places)[chosen].numpy()
            self._counts[number] += np.bincount(flat, minlength=self._counts[0].size).reshape(self._counts[0].shape)

    def merge(self, other: "LabelScores") -> None:
        """See `Scores.merge`."""
        self._merge_loss(other)
        self._counts += other._counts

    def result(self) -> dict[str, Any]:
        """`loss`, `accuracy` (of single labels), `f1` and `average_precision`, means over the labels that occur.

        Average precision is counted at 2,000 places of the logits; samples whose logits fall between the same two count as equal.
        """
        negatives, positives = self._counts
        middle = _BINS // 2
        given_rightly, given_wrongly = positives[:, middle:].sum(1), negatives[:, middle:].sum(1)
        total, has = positives.sum(1) + negatives.sum(1), positives.sum(1)
        right = given_rightly + negatives[:, :middle].sum(1)
        occurs = (has + given_wrongly) > 0
        f1 = 2 * given_rightly[occurs] / np.maximum(1, has + given_rightly + given_wrongly)[occurs]
        # From the highest score down: precision at each place, weighted by the recall that is gained there.
        hits, all_given = positives[:, ::-1].cumsum(1), self._counts.sum(0)[:, ::-1].cumsum(1)
        gained = positives[:, ::-1] / np.maximum(1, has)[:, None]
        precision = (gained * hits / np.maximum(1, all_given)).sum(1)
        return {
            "loss": self.loss,
            "accuracy": float(right.sum() / max(1, int(total.sum()))),
            "f1": float(f1.mean()) if occurs.any() else 0.0,
            "average_precision": float(precision[has > 0].mean()) if (has > 0).any() else 0.0,
        }

"""Scores of a model on some data: collected micro-batch by micro-batch, as counts and sums."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

Direction = Literal["min", "max"]
DIRECTIONS: Mapping[str, Direction] = {
    "loss": "min", "perplexity": "min", "mse": "min", "mae": "min",
    "accuracy": "max", "top5": "max", "f1": "max", "average_precision": "max", "miou": "max", "r2": "max",
}  # fmt: skip
"""Whether the least or the greatest value of a score is the best."""


class Scores(ABC):
    """Collects how good outputs are, of one micro-batch after the other; keeps sums, and no outputs."""

    def __init__(self) -> None:
        self._loss_sum, self._weight = 0.0, 0.0

    @abstractmethod
    def add(self, outputs: tuple[Tensor, ...], targets: Tensor) -> None:
        """Count a micro-batch.

        Args:
            outputs: Output tensors of the model, (B, ...) each: of whole samples, or, where the loss is a sum over rows, of any rows.
            targets: Targets (B, ...), as they are kept, on the host.
        """

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Count what another one of the same kind has counted."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """Return the scores by name: `loss`, and what else there is; none of which nothing counts."""

    def _add_loss(self, mean: float, weight: float) -> None:
        if weight:
            self._loss_sum += mean * weight
            self._weight += weight

    def _merge_loss(self, other: "Scores") -> None:
        self._loss_sum += other._loss_sum
        self._weight += other._weight

    @property
    def loss(self) -> float | None:
        """Mean loss over all that counts, or None where nothing does."""
        return self._loss_sum / self._weight if self._weight else None


def with_prefix(prefix: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return scores under names with a prefix, as `test_loss`; perplexity has none.

    Args:
        prefix: Name of the part of the data.
        scores: Scores by name.

    Example:
        >>> with_prefix("test", {"loss": 0.5, "perplexity": 1.6})
        {'test_loss': 0.5, 'perplexity': 1.6}
    """
    return {name if name == "perplexity" else f"{prefix}_{name}": value for name, value in scores.items()}

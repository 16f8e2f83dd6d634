"""Regression: numbers are predicted, one or several for a sample."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks.scores import Scores
from lowmem_pnn.tasks.task import Task, at_least_float32

RegressionLoss = Literal["mse", "l1", "smooth-l1", "huber"]
_FUNCTIONS: dict[RegressionLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": nn.functional.mse_loss, "l1": nn.functional.l1_loss, "smooth-l1": nn.functional.smooth_l1_loss,
    "huber": nn.functional.huber_loss,
}  # fmt: skip


class Regression(Task):
    """Mean loss of predicted values (B, ...) against right ones of as many elements.

    A model with one output (B, 1) and targets (B,) fit: PyTorch's own losses would take all pairs of them.

    Args:
        targets: Form of the targets.
        function: Name of the loss.
        output: Number of the model's output tensor that the loss is taken of.
    """

    name = "regression"

    def __init__(self, targets: Targets, function: RegressionLoss = "mse", *, output: int = 0) -> None:
        super().__init__(targets, output)
        self._function = _FUNCTIONS[function]

    @property
    def head_size(self) -> int | None:
        """Values of a sample, where they are one or a row of them."""
        return self.targets.num_classes if len(self.targets.shape) <= 1 else None

    def misfit(self, outputs: tuple[TensorSpec, ...]) -> str | None:
        """See `Task.misfit`."""
        wanted = self.targets.shape or (1,)
        if _squeezed(outputs[self.output].shape) == _squeezed(self.targets.shape):
            return None
        return f"{math.prod(wanted)} values to predict; it should give ({', '.join(map(str, ('batch', *wanted)))})"

    def loss(self, outputs: tuple[Tensor, ...], targets: Tensor, *, training: bool) -> Tensor:
        """See `Task.loss`."""
        values = at_least_float32(outputs[self.output])
        return self._function(values, targets.reshape(values.shape))

    def task_score_names(self, outputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
        """See `Task.task_score_names`."""
        return ("loss", "mse", "mae", "r2")

    def task_scores(self) -> "ValueScores":
        """See `Task.task_scores`."""
        return ValueScores(self)


class ValueScores(Scores):
    """Loss, mean squared and absolute error, and R2 of values.

    Args:
        task: What is measured.
    """

    def __init__(self, task: Regression) -> None:
        super().__init__()
        self._task = task
        elements = math.prod(task.targets.shape)
        # Sums over samples, of each value: of squared errors, of absolute ones, of right values and of their squares' deviations.
        self._squared, self._absolute, self._mean, self._spread = torch.zeros(4, elements, dtype=torch.float64)
        self._samples = 0

    def add(self, outputs: tuple[Tensor, ...], targets: Tensor) -> None:
        """See `Scores.add`."""
        on_device = targets.to(outputs[self._task.output].device)
        self._add_loss(float(self._task.loss(outputs, on_device, training=False)), len(targets))
        right = targets.reshape(len(targets), -1).double()
        errors = outputs[self._task.output].cpu().double().reshape(right.shape) - right
        self._squared += (errors**2).sum(0)
        self._absolute += errors.abs().sum(0)
        mean = right.mean(0)
        self._add_spread(len(right), mean, ((right - mean) ** 2).sum(0))

    def merge(self, other: "ValueScores") -> None:
        """See `Scores.merge`."""
        self._merge_loss(other)
        self._squared += other._squared
        self._absolute += other._absolute
        self._add_spread(other._samples, other._mean, other._spread)

    def _add_spread(self, samples: int, mean: Tensor, spread: Tensor) -> None:
        """Add samples to mean and sum of squared deviations, without loss of digits (Chan, Golub and LeVeque 1979)."""
        if not samples:
            return
        total = self._samples + samples
        step = mean - self._mean
        self._spread = self._spread + spread + step**2 * (self._samples * samples / total)
        self._mean = self._mean + step * (samples / total)
        self._samples = total

    def result(self) -> dict[str, Any]:
        """`loss`, `mse`, `mae`, and `r2`, the mean over values of 1 - squared error / variance; not where a value never varies."""
        count = max(1, self._samples * len(self._mean))
        scores = {"loss": self.loss, "mse": float(self._squared.sum()) / count, "mae": float(self._absolute.sum()) / count}
        if self._samples > 1 and bool((self._spread > 0).all()):
            scores["r2"] = float((1 - self._squared / self._spread).mean())
        return scores


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)

"""The interface of a task: its loss, how micro-batches of it add up to a batch, and its scores."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.profiling.costs import Affine
from lowmem_pnn.sources.targets import PYTORCH_IGNORED, Targets
from lowmem_pnn.tasks.own_metrics import GivenMetrics, ScoresAndMetrics
from lowmem_pnn.tasks.scores import Scores


class Task(ABC):
    """What a model learns to predict.

    Args:
        targets: Form of the targets.
        output: Number of the model's output tensor that the loss is taken of.
    """

    name: ClassVar[str]
    """What `--task` calls it."""
    needs_whole_batch: bool = False
    """Whether the loss of a batch is not made up of those of its parts."""

    def __init__(self, targets: Targets, output: int = 0) -> None:
        self.targets, self.output = targets, output
        self.class_weights: tuple[float, ...] = ()
        """Weights of the classes or labels in the loss; empty where they count alike."""
        # Metrics of the user's own, beside the task's scores.
        self.metrics: GivenMetrics | None = None

    @property
    def ignored(self) -> int:
        """Class number that losses and scores leave out: the one that was asked for, else PyTorch's."""
        return PYTORCH_IGNORED if self.targets.ignored is None else self.targets.ignored

    @property
    def rows_per_sample(self) -> int | None:
        """Rows of outputs of one sample, where the loss is a sum over rows, which may be computed apart; None where it is not."""
        return None

    @property
    def is_by_rows(self) -> bool:
        """Whether the last layer and all that is measured may be computed for some rows at a time: metrics that were given take samples."""
        return self.rows_per_sample is not None and self.metrics is None

    @property
    def plain_smoothing(self) -> float | None:
        """Label smoothing of a loss that is the plain mean cross entropy of rows against class numbers; None where it is another loss."""
        return None

    @property
    def training_targets(self) -> Targets:
        """Form of the targets of training batches: those of the data, or what becomes of them when samples are mixed."""
        return self.targets

    @property
    def head_size(self) -> int | None:
        """Outputs of a head that learns this task from any layer; None where heads cannot."""
        return None

    @abstractmethod
    def misfit(self, outputs: tuple[TensorSpec, ...]) -> str | None:
        """Say what is wrong with a model's outputs for this task: what they should be; None where nothing is.

        Args:
            outputs: Output tensors of the model.
        """

    @abstractmethod
    def loss(self, outputs: tuple[Tensor, ...], targets: Tensor, *, training: bool) -> Tensor:
        """Return the mean loss of a micro-batch, a scalar that can be differentiated.

        Args:
            outputs: Output tensors of the model, each (B, ...).
            targets: Targets (B, ...), as they are kept, on the same device; some of them count.
            training: Whether it is trained on: smoothing of labels is left out of measures.
        """

    def loss_of_rows(self, rows: Tensor, targets: Tensor, *, training: bool) -> Tensor:
        """Return the sum of the losses of some rows.

        Args:
            rows: Rows of outputs, (R, ...).
            targets: Their targets, (R, ...).
            training: As for `loss`.
        """
        raise NotImplementedError(f"the loss of {self.name} is no sum over rows")

    def count(self, targets: Tensor) -> float:
        """Return what the mean loss is a mean over: by it micro-batches weigh in their batch.

        Args:
            targets: Targets (B, ...), as they are kept.
        """
        return len(targets)

    def shares(self, targets: Tensor, parts: Sequence[slice], outputs: tuple[TensorSpec, ...]) -> list[float]:
        """Return the weights of a batch's micro-batches, which make the sum of their mean losses that of the batch.

        Args:
            targets: Targets of the batch, as they are kept, on the host.
            parts: Ranges of its samples.
            outputs: Output tensors of the model.

        Returns:
            A weight for each part; 0 where nothing in it counts.
        """
        counts = [self.count(targets[part]) for part in parts]
        total = sum(counts)
        return [count / total if count else 0.0 for count in counts]

    def num_correct(self, outputs: tuple[Tensor, ...], targets: Tensor) -> tuple[int, int] | None:
        """Return how many answers are right, and of how many; None where answers are not right or wrong.

        Args:
            outputs: Output tensors of the model, each (B, ...).
            targets: Targets (B, ...), on the same device.
        """
        return None

    def scores(self) -> Scores:
        """Return a collector of scores, empty: the task's own, and the metrics that were given."""
        scores = self.task_scores()
        return scores if self.metrics is None else ScoresAndMetrics(scores, self.metrics)

    def score_names(self, outputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
        """Return the names of the scores that are one number each, as `scores` may give them.

        Args:
            outputs: Output tensors of the model.
        """
        return (*self.task_score_names(outputs), *(() if self.metrics is None else self.metrics.metrics))

    @abstractmethod
    def task_scores(self) -> Scores:
        """Return a collector of the task's own scores, empty."""

    @abstractmethod
    def task_score_names(self, outputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
        """Return the names of those of them that are one number each.

        Args:
            outputs: Output tensors of the model.
        """

    def memory(self, output_bytes: int) -> Affine:
        """Return the device memory of the loss, in bytes, without the outputs and their gradient.

        Args:
            output_bytes: Bytes of the outputs per sample, in float32 or wider.
        """
        return Affine(0, 2 * output_bytes)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or wider: losses are not computed in lower precision."""
    return tensor if tensor.dtype.itemsize >= torch.float32.itemsize else tensor.float()

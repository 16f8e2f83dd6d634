"""Classification: of samples, of the tokens that come next, or of pixels, by cross entropy."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.profiling.costs import Affine
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks.scores import Scores
from lowmem_pnn.tasks.task import Task, at_least_float32

# The square of so many classes is kept for the confusion matrix.
_MOST_CONFUSED = 64
_TOP = 5


class Classification(Task):
    """Mean cross entropy against class numbers, as `nn.CrossEntropyLoss` has it.

    Scores are (B, classes), or (B, T, classes) for tokens, or (B, classes, H, W) for masks; more classes than the data has may be
    scored. Targets may be a probability for each class too.

    Args:
        targets: Form of the targets.
        label_smoothing: Smoothing of the labels in training (Szegedy et al. 2016, section 7); measures have none.
        class_weights: Weight of each class in the mean; None for equal ones.
        output: Number of the model's output tensor that the loss is taken of.
        mixes: Whether training batches have probabilities in the place of class numbers, since their samples are mixed.
    """

    name = "classification"

    def __init__(
        self,
        targets: Targets,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        *,
        output: int = 0,
        mixes: bool = False,
    ) -> None:
        super().__init__(targets, output)
        self._mixes = mixes
        self._label_smoothing = label_smoothing
        self.class_weights = tuple(class_weights or ())
        self._weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    @property
    def rows_per_sample(self) -> int | None:
        """1, or the tokens of a sample; None for masks and probabilities."""
        return math.prod(self.targets.shape) if self.targets.kind in ("class", "tokens") and not self._mixes else None

    @property
    def plain_smoothing(self) -> float | None:
        """See `Task.plain_smoothing`: not with weights of classes."""
        return self._label_smoothing if self.rows_per_sample is not None and self._weights is None else None

    @property
    def training_targets(self) -> Targets:
        """See `Task.training_targets`: probabilities where batches are mixed."""
        if not self._mixes:
            return self.targets
        classes = self.targets.num_classes
        return Targets("probabilities", classes, (classes,), torch.float32)

    @property
    def head_size(self) -> int | None:
        """Number of classes; None for masks."""
        return None if self.targets.kind == "mask" else self.targets.num_classes

    def misfit(self, outputs: tuple[TensorSpec, ...]) -> str | None:
        """See `Task.misfit`."""
        classes, kind = self.targets.num_classes, self.targets.kind
        if kind == "mask":
            wanted: tuple[Any, ...] = (classes, *self.targets.shape)
            fits = outputs[self.output].shape[1:] == wanted[1:] and outputs[self.output].shape[0] >= classes
        else:
            rows = self.targets.shape if kind == "tokens" else ()
            wanted = (*rows, classes)
            shape = outputs[self.output].shape
            # Probabilities have one for each score.
            fits = (
                bool(shape) and shape[:-1] == rows and (shape[-1] == classes if kind == "probabilities" else shape[-1] >= classes)
            )
        if fits:
            return None
        return f"{classes} classes; it should give ({', '.join(map(str, ('batch', *wanted)))}), or more scores than that"

    def loss(self, outputs: tuple[Tensor, ...], targets: Tensor, *, training: bool) -> Tensor:
        """See `Task.loss`."""
        return self.loss_of(outputs[self.output], targets, training=training)

    def loss_of(self, scores: Tensor, targets: Tensor, *, training: bool) -> Tensor:
        """Return the mean loss of class scores, and as many targets; arguments as for `loss`."""
        if self.targets.kind == "mask":
            return self._cross_entropy(at_least_float32(scores), targets.long(), "mean", training)
        return self._cross_entropy(at_least_float32(scores).flatten(0, -2), self._rows(targets), "mean", training)

    def loss_of_rows(self, rows: Tensor, targets: Tensor, *, training: bool) -> Tensor:
        """See `Task.loss_of_rows`."""
        return self._cross_entropy(at_least_float32(rows), targets, "sum", training)

    def count(self, targets: Tensor) -> float:
        """Return the number of labels that are not left out, or the sum of their classes' weights."""
        if targets.is_floating_point():
            return len(targets)  # as PyTorch has it, whatever the weights of the classes
        if self._weights is None:
            return int((targets != self.ignored).sum())
        counted = targets[targets != self.ignored].long()
        return float(self._weights.to(torch.float64)[counted.cpu()].sum())

    def num_correct(self, outputs: tuple[Tensor, ...], targets: Tensor) -> tuple[int, int]:
        """See `Task.num_correct`."""
        predicted, right = self._answers(outputs[self.output], targets)
        counted = right != self.ignored
        return int(((predicted == right) & counted).sum()), int(counted.sum())

    def task_scores(self) -> "ClassScores":
        """See `Task.task_scores`."""
        return ClassScores(self)

    def task_score_names(self, outputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
        """See `Task.task_score_names`."""
        if self.targets.kind == "tokens":
            return ("loss", "perplexity")
        if self.targets.kind == "mask":
            return ("loss", "accuracy", "miou")
        return ("loss", "accuracy", "f1", *(("top5",) if outputs[self.output].shape[-1] > _TOP else ()))

    def _answers(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classes with the highest score, and the right ones."""
        if self.targets.kind == "mask":
            return scores.argmax(1), targets
        if targets.is_floating_point():
            return scores.argmax(-1), targets.argmax(-1)
        return scores.argmax(-1), targets

    def _rows(self, targets: Tensor) -> Tensor:
        return targets if targets.is_floating_point() else targets.flatten()

    def memory(self, output_bytes: int) -> Affine:
        """See `Task.memory`; probabilities are smoothed, and multiplied with scores, one for each."""
        return Affine(0, (5 if self._mixes else 2) * output_bytes)

    def _cross_entropy(self, scores: Tensor, targets: Tensor, reduction: str, training: bool) -> Tensor:
        weights = self._weights
        if weights is not None:
            # More classes may be scored than the data has.
            extra = scores.shape[1] - len(weights)
            weights = nn.functional.pad(weights, (0, extra), value=1.0).to(scores.device)
        if self._mixes and targets.is_floating_point() and (extra := scores.shape[1] - targets.shape[1]):
            targets = nn.functional.pad(targets, (0, extra))
        return nn.functional.cross_entropy(
            scores,
            targets,
            weights,
            reduction=reduction,
            label_smoothing=self._label_smoothing if training else 0.0,
            ignore_index=self.ignored,
        )


class ClassScores(Scores):
    """Loss, accuracy, macro F1 and more of classes; of tokens loss and perplexity; of masks the mean intersection over union.

    Args:
        task: What is measured.
    """

    def __init__(self, task: Classification) -> None:
        super().__init__()
        self._task, self._tokens = task, task.targets.kind == "tokens"
        # For each class: samples that have it, samples that were given it, and samples that rightly were.
        self._counts = np.zeros((3, 0), dtype=np.int64)
        self._confusion = np.zeros((0, 0), dtype=np.int64)
        self._in_top = 0

    def add(self, outputs: tuple[Tensor, ...], targets: Tensor) -> None:
        """See `Scores.add`."""
        scores = outputs[self._task.output]
        on_device = targets.to(scores.device)
        if self._tokens:
            scores, on_device, targets = scores.flatten(0, -2), on_device.flatten(), targets.flatten()
        weight = self._task.count(targets)
        if weight:
            self._add_loss(float(self._task.loss_of(scores, on_device, training=False)), weight)
        if self._tokens:
            return
        predicted, right = (part.to("cpu", torch.int64).flatten() for part in self._task._answers(scores, on_device))
        counted = right != self._task.ignored
        predicted, right = predicted[counted], right[counted]
        classes = scores.shape[1]
        if self._counts.shape[1] == 0:
            self._counts = np.zeros((3, classes), dtype=np.int64)
            self._confusion = np.zeros((classes, classes) if classes <= _MOST_CONFUSED else (0, 0), dtype=np.int64)
        for counts, numbers in zip(self._counts, (right, predicted, right[right == predicted]), strict=True):
            counts += np.bincount(numbers.numpy(), minlength=classes)
        if len(self._confusion):
            self._confusion += np.bincount((right * classes + predicted).numpy(), minlength=classes**2).reshape(classes, classes)
        if scores.ndim == 2 and classes > _TOP:
            best = scores.topk(_TOP, 1).indices.to("cpu")
            self._in_top += int((best[counted] == right[:, None]).any(1).sum())

    def merge(self, other: "ClassScores") -> None:
        """See `Scores.merge`."""
        self._merge_loss(other)
        if self._counts.shape[1] == 0:
            self._counts, self._confusion = np.zeros_like(other._counts), np.zeros_like(other._confusion)
        self._counts += other._counts
        self._confusion += other._confusion
        self._in_top += other._in_top

    def result(self) -> dict[str, Any]:
        """`loss` (mean cross entropy), and what tells how good that is.

        Returns:
            With it `accuracy`, `f1` (macro, over the classes that occur or were predicted), `top5` where there are more than five classes,
            and `confusion` (a row of counts for each right class) up to 64 classes; of masks `accuracy` and `miou` over pixels; of
            tokens `perplexity`, the exponential of the loss.
        """
        loss = self.loss
        scores: dict[str, Any] = {} if loss is None else {"loss": loss}
        if self._tokens:
            # Above that a float overflows.
            return {**scores, "perplexity": math.exp(loss) if loss < 709 else math.inf} if loss is not None else scores
        # Not scikit-learn's: importing it here would take memory out of the budget, at the very end of a run.
        actual, predicted, right = self._counts
        occurs, total = (actual + predicted) > 0, int(actual.sum())
        if not total:
            return scores
        scores["accuracy"] = int(right.sum()) / total
        if self._task.targets.kind == "mask":
            union = (actual + predicted - right)[occurs]
            return {**scores, "miou": float((right[occurs] / union).mean())}
        scores["f1"] = float((2 * right[occurs] / (actual + predicted)[occurs]).mean())
        if len(actual) > _TOP:
            scores["top5"] = self._in_top / total
        if len(self._confusion):
            scores["confusion"] = self._confusion.tolist()
        return scores

"""Metrics of the user's own, beside a task's scores: any functions of a model's outputs and of targets, or torchmetrics objects."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.errors import ConfigError, LowMemError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks.scores import Scores

OwnMetrics = Mapping[str, Any]
"""Functions of outputs and targets by name, which return a pair (sum, count); or torchmetrics objects."""


class GivenMetrics:
    """Metrics that were given, and what they are called with: what the model returns, and targets, both on the host.

    Args:
        metrics: Metrics by name.
        targets: Form of the targets.
        rebuild: Makes what the model returns of its output tensors.
    """

    def __init__(self, metrics: OwnMetrics, targets: Targets, rebuild: Callable[[tuple[Tensor, ...]], Any]) -> None:
        self.metrics, self._targets, self._rebuild = metrics, targets, rebuild

    def check_names(self, scores: tuple[str, ...]) -> None:
        """Refuse names that the task's own scores have, which one of the two would hide.

        Args:
            scores: Names of these.

        Raises:
            ConfigError: There is one.
        """
        for name in self.metrics:
            if name in scores:
                raise ConfigError(f"metrics: {name!r} is a score that is reported anyway; call your metric otherwise")

    def keeping_all(self) -> list[str]:
        """Return the names of the metrics that keep every answer until the end, as those of torchmetrics do whose states are lists."""
        return [name for name, metric in self.metrics.items() if is_torchmetric(metric) and _has_lists(metric)]

    def examine(self, targets: Tensor, outputs: tuple[TensorSpec, ...]) -> None:
        """Try the metrics on made-up outputs, before a training ends with what they raise.

        Args:
            targets: Targets of two samples or more, as they are kept.
            outputs: Output tensors of the model.

        Raises:
            ConfigError: A metric raises, or does not return a pair.
        """
        made_up = made_up_outputs(outputs, len(targets))
        whole, part = MetricValues(self), MetricValues(self)
        whole.add(made_up, targets)
        part.add(made_up, targets)
        whole.merge(part)

    @property
    def are_labels(self) -> bool:
        """Whether targets are 0 and 1 for each of several labels, kept as floats."""
        return self._targets.kind == "labels"

    def arguments(self, outputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Any, Any]:
        """Return what a metric is called with.

        Args:
            outputs: Output tensors of the model, each (B, ...).
            targets: Targets (B, ...), as they are kept, on the host.
        """
        # Masks are kept as bytes, which nobody's metrics take for class numbers.
        wanted = targets.long() if self._targets.are_classes else self._targets.unpack(targets)
        return self._rebuild(tuple(tensor.cpu() for tensor in outputs)), wanted


class MetricValues:
    """Collects the metrics that were given, micro-batch by micro-batch.

    Objects of torchmetrics are updated where a micro-batch is counted for good, one after the other, as in a plain loop: not all of their
    states can be merged.

    Args:
        given: The metrics.
    """

    def __init__(self, given: GivenMetrics) -> None:
        self._given = given
        self._sums: dict[str, tuple[float, float]] = {}
        # What the objects are still to be updated with.
        self._waiting: list[tuple[Any, Any]] = []

    def add(self, outputs: tuple[Tensor, ...], targets: Tensor) -> None:
        """Count a micro-batch.

        Args:
            outputs: Output tensors of the model, each (B, ...), of whole samples.
            targets: Targets (B, ...), as they are kept, on the host.
        """
        called_with = self._given.arguments(outputs, targets)
        for name, metric in self._given.metrics.items():
            if not is_torchmetric(metric):
                with _naming(name, outputs):
                    total, number = metric(*called_with)
                    self._add_sums(name, float(total), float(number))
        if any(map(is_torchmetric, self._given.metrics.values())):
            self._waiting.append(called_with)

    def merge(self, other: "MetricValues") -> None:
        """Count what another one has counted."""
        for name, sums in other._sums.items():
            self._add_sums(name, *sums)
        self._waiting += other._waiting
        self._update()

    def result(self) -> dict[str, Any]:
        """Return the metrics by name; none of which nothing counts."""
        self._update()
        found: dict[str, Any] = {}
        for name, metric in self._given.metrics.items():
            if not is_torchmetric(metric):
                total, number = self._sums.get(name, (0.0, 0.0))
                found |= {name: total / number} if number else {}
            elif name in self._objects:
                with _naming(name):
                    found[name] = _value(self._objects[name].compute())
        return found

    @cached_property
    def _objects(self) -> dict[str, Any]:
        """The objects of torchmetrics, as they are before anything is counted; those that were given stay as they are."""
        objects = {name: copy.deepcopy(metric) for name, metric in self._given.metrics.items() if is_torchmetric(metric)}
        for name, metric in objects.items():
            with _naming(name):
                metric.reset()
        return objects

    def _update(self) -> None:
        for outputs, targets in self._waiting:
            for name, metric in self._objects.items():
                with _naming(name):
                    metric.update(outputs, targets.long() if self._given.are_labels and _classifies(metric) else targets)
        self._waiting.clear()

    def _add_sums(self, name: str, total: float, number: float) -> None:
        before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = before[0] + total, before[1] + number


class ScoresAndMetrics(Scores):
    """The scores of a task, and the metrics that were given beside them.

    Args:
        scores: Collects the task's own scores.
        given: The metrics.
    """

    def __init__(self, scores: Scores, given: GivenMetrics) -> None:
        super().__init__()
        self._scores, self._values = scores, MetricValues(given)

    def add(self, outputs: tuple[Tensor, ...], targets: Tensor) -> None:
        """See `Scores.add`; the outputs are of whole samples."""
        self._scores.add(outputs, targets)
        self._values.add(outputs, targets)

    def merge(self, other: "ScoresAndMetrics") -> None:
        """See `Scores.merge`."""
        self._scores.merge(other._scores)
        self._values.merge(other._values)

    def result(self) -> dict[str, Any]:
        """Return the task's scores, and the metrics by their names."""
        return {**self._scores.result(), **self._values.result()}

    @property
    def loss(self) -> float | None:
        """See `Scores.loss`."""
        return self._scores.loss


def made_up_outputs(outputs: tuple[TensorSpec, ...], samples: int) -> tuple[Tensor, ...]:
    """Return outputs between 0 and 1, the same each time, which losses of probabilities take too.

    Args:
        outputs: Output tensors of a model.
        samples: Number of samples.
    """
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.rand(samples, *spec.shape, generator=generator).to(spec.dtype if spec.dtype.is_floating_point else torch.int64)
        for spec in outputs
    )


@contextmanager
def _naming(name: str, outputs: tuple[Tensor, ...] = ()) -> Iterator[None]:
    """Put what a user's metric raises into one line, with its name."""
    try:
        yield
    except Exception as error:  # whatever a user's function raises is the user's to see
        if isinstance(error, LowMemError) or is_out_of_memory(error):
            raise
        shapes = f" on outputs {', '.join(str(tuple(tensor.shape)) for tensor in outputs)}" if outputs else ""
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"metric {name!r} failed{shapes}: {type(error).__name__}: {reason}; give a function of outputs and targets that returns a pair "
            "(sum, count), or an object of torchmetrics"
        ) from error


def is_torchmetric(metric: Any) -> bool:
    """Decide whether a metric is an object that collects what it measures, as those of torchmetrics are."""
    return hasattr(metric, "update") and hasattr(metric, "compute")


def _classifies(metric: Any) -> bool:
    """Decide whether a metric is of those of torchmetrics that take 0 and 1 as integers alone, or may have such among others."""
    return any(
        kind.__module__.startswith(("torchmetrics.classification", "torchmetrics.collections")) for kind in type(metric).__mro__
    )


def _has_lists(metric: Any) -> bool:
    parts = metric.modules() if isinstance(metric, nn.Module) else [metric]  # a collection has several
    return any(isinstance(state, list) for part in parts for state in getattr(part, "_defaults", {}).values())


def _value(result: Any) -> Any:
    if isinstance(result, Mapping):
        return {str(name): _value(one) for name, one in result.items()}
    return result.tolist() if isinstance(result, Tensor) else result

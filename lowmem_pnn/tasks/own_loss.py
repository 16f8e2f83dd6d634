"""A loss of the user's own, and metrics of his own: any function of a model's outputs and of targets."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.profiling.costs import Affine
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks.scores import Scores
from lowmem_pnn.tasks.task import Task

OwnLoss = Callable[[Any, Any], Any]
"""Function of outputs and targets, which returns the mean over samples, or a pair: a sum, and the count that it is over."""

OwnMetrics = Mapping[str, Any]
"""Functions of outputs and targets by name, which return a pair (sum, count); or torchmetrics objects."""

# Relative difference up to which the parts of a batch give what the batch gives.
_ROUNDING = 1e-4


class OwnTask(Task):
    """A loss of the user's own.

    Args:
        targets: Form of the targets.
        loss: The loss.
        metrics: Metrics by name.
        name: What the loss is called in messages.
        rebuild: Makes what the model returns of its output tensors.
    """

    name = "own"

    def __init__(
        self, targets: Targets, loss: OwnLoss, metrics: OwnMetrics, name: str, rebuild: Callable[[tuple[Tensor, ...]], Any]
    ) -> None:
        super().__init__(targets)
        self._function, self._metrics, self._title, self._rebuild = loss, metrics, name, rebuild
        if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
            raise ConfigError(f"loss {name} has parameters of its own, which no step would train; make it a part of the model")
        self.needs_whole_batch = False

    def misfit(self, outputs: tuple[TensorSpec, ...]) -> str | None:
        """Nothing: the loss itself takes outputs, or raises."""
        return None

    def examine(self, targets: Tensor, outputs: tuple[TensorSpec, ...]) -> None:
        """Find out, on made-up outputs, whether parts of a batch add up to the batch.

        Args:
            targets: Targets of a few samples, as they are kept.
            outputs: Output tensors of the model.

        Raises:
            ConfigError: The loss raises, or does not return a number, or a pair of numbers.
        """
        parts = [slice(0, 1), slice(1, len(targets))]
        made_up = _made_up(outputs, len(targets))
        given, before = self._function, _state_of(self._function)
        try:
            # On a copy: what it is tried on is no batch.
            self._function = copy.deepcopy(given)
            whole = float(self.loss(made_up, targets, training=True))
            shares = self.shares(targets, parts, outputs)
            pieces = [
                float(self.loss(tuple(tensor[part] for tensor in made_up), targets[part], training=True)) * share
                for part, share in zip(parts, shares, strict=True)
                if share
            ]
        except ConfigError:
            raise
        except Exception as error:  # whatever a user's function raises is the user's to see
            shapes = ", ".join(str(("batch", *spec.shape)) for spec in outputs)
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"loss {self._title} failed on outputs {shapes} and targets of {len(targets)} samples: {type(error).__name__}: {reason}; mend "
                "it"
            ) from error
        finally:
            tried, self._function = self._function, given
        if changed := [name for name, value in _state_of(tried).items() if not _same(value, before.get(name))]:
            raise ConfigError(
                f"loss {self._title} changes its {changed[0]!r} when it is called, which no commit keeps, and once for each part of a batch; "
                "make it a part of the model, in a buffer"
            )
        self.needs_whole_batch = not abs(sum(pieces) - whole) <= _ROUNDING * max(abs(whole), 1e-12)

    def loss(self, outputs: tuple[Tensor, ...], targets: Tensor, *, training: bool) -> Tensor:
        """See `Task.loss`."""
        value, count = self._call(outputs, targets)
        return value if count is None else value / count

    def shares(self, targets: Tensor, parts: Sequence[slice], outputs: tuple[TensorSpec, ...]) -> list[float]:
        """See `Task.shares`; a loss that returns its count is asked for it, on made-up outputs, before the first part is learnt."""
        if len(parts) == 1:
            return [1.0]
        counts: list[float] = []
        for part in parts:
            size = part.stop - part.start
            _, count = self._call(_made_up(outputs, size), targets[part])
            counts.append(size if count is None else float(count))
            if count is None:
                return [(one.stop - one.start) / len(targets) for one in parts]
        total = sum(counts)
        return [count / total if count else 0.0 for count in counts]

    def score_names(self, outputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
        """See `Task.score_names`: the loss, and the metrics."""
        return ("loss", *self._metrics)

    def scores(self) -> "OwnScores":
        """See `Task.scores`."""
        return OwnScores(self, self._metrics)

    def structure(self, outputs: tuple[Tensor, ...]) -> Any:
        """Return what the model returns, of its output tensors."""
        return self._rebuild(outputs)

    def _call(self, outputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor | float | None]:
        """Return the loss, and the count that it is a sum over; None where it is a mean over samples."""
        if isinstance(self._function, nn.Module):
            self._function.to(outputs[0].device)
        result = self._function(self._rebuild(outputs), self.targets.unpack(targets))
        value, count = result if isinstance(result, tuple | list) and len(result) == 2 else (result, None)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ConfigError(
                f"loss {self._title} returned {found}; return one number as a tensor, the mean over samples, or a pair (sum, count)"
            )
        return value.reshape(()), count

    def memory(self, output_bytes: int) -> Affine:
        """Return a guess, which the measured check before training corrects: a copy of the outputs, and of their gradient, twice."""
        return Affine(0, 4 * output_bytes)


class OwnScores(Scores):
    """Mean loss, and the user's own metrics.

    Args:
        task: What is measured.
        metrics: Metrics by name.
    """

    def __init__(self, task: OwnTask, metrics: OwnMetrics) -> None:
        super().__init__()
        self._task = task
        self._sums: dict[str, tuple[float, float]] = {}
        self._functions = {name: metric for name, metric in metrics.items() if not _is_torchmetric(metric)}
        self._metrics = {name: copy.deepcopy(metric) for name, metric in metrics.items() if _is_torchmetric(metric)}
        for metric in self._metrics.values():
            metric.reset()

    def add(self, outputs: tuple[Tensor, ...], targets: Tensor) -> None:
        """See `Scores.add`; metrics get outputs and targets on the host."""
        value, count = self._task._call(outputs, targets.to(outputs[0].device))
        weight = len(targets) if count is None else float(count)
        self._add_loss(float(value) if count is None else float(value) / max(weight, 1e-30), weight)
        if not (self._functions or self._metrics):
            return
        on_host = self._task.structure(tuple(tensor.cpu() for tensor in outputs))
        wanted = self._task.targets.unpack(targets)
        for name, function in self._functions.items():
            total, number = function(on_host, wanted)
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = before[0] + float(total), before[1] + float(number)
        for metric in self._metrics.values():
            metric.update(on_host, wanted)

    def merge(self, other: "OwnScores") -> None:
        """See `Scores.merge`."""
        self._merge_loss(other)
        for name, (total, number) in other._sums.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = before[0] + total, before[1] + number
        for name, metric in self._metrics.items():
            metric.merge_state(other._metrics[name])

    def result(self) -> dict[str, Any]:
        """`loss`, and the metrics by their names."""
        means = {name: total / number for name, (total, number) in self._sums.items() if number}
        loss = {} if self.loss is None else {"loss": self.loss}
        return {**loss, **means, **{name: _value(metric.compute()) for name, metric in self._metrics.items()}}


def _state_of(loss: OwnLoss) -> dict[str, Any]:
    """Return what a loss holds: tensors of a module, and plain values of any object."""
    held = dict(loss.state_dict()) if isinstance(loss, nn.Module) else {}
    plain = {
        name: value for name, value in getattr(loss, "__dict__", {}).items() if isinstance(value, int | float | str | Tensor)
    }
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in {**held, **plain}.items()}


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)


def _is_torchmetric(metric: Any) -> bool:
    return hasattr(metric, "update") and hasattr(metric, "compute")


def _value(result: Any) -> Any:
    return result.tolist() if isinstance(result, Tensor) else result


def _made_up(outputs: tuple[TensorSpec, ...], samples: int) -> tuple[Tensor, ...]:
    """Return outputs between 0 and 1, the same each time, which losses of probabilities take too."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.rand(samples, *spec.shape, generator=generator).to(spec.dtype if spec.dtype.is_floating_point else torch.int64)
        for spec in outputs
    )

"""A loss of the user's own: any function of a model's outputs and of targets."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.profiling.costs import Affine
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks.own_metrics import made_up_outputs
from lowmem_pnn.tasks.scores import Scores
from lowmem_pnn.tasks.task import Task

OwnLoss = Callable[[Any, Any], Any]
"""Function of outputs and targets, which returns the mean over samples, or a pair: a sum, and the count that it is over."""

# Relative difference up to which the parts of a batch give what the batch gives.
_ROUNDING = 1e-4
# Of the losses themselves, not of what somebody derives from them.
_FORWARDS = (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)


class OwnTask(Task):
    """A loss of the user's own.

    Args:
        targets: Form of the targets.
        loss: The loss.
        name: What the loss is called in messages.
        rebuild: Makes what the model returns of its output tensors.
    """

    name = "own"

    def __init__(self, targets: Targets, loss: OwnLoss, name: str, rebuild: Callable[[tuple[Tensor, ...]], Any]) -> None:
        super().__init__(targets)
        self._function, self._title, self._rebuild = loss, name, rebuild
        if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
            raise ConfigError(f"loss {name} has parameters of its own, which no step would train; make it a part of the model")
        self.needs_whole_batch = False

    @property
    def function(self) -> OwnLoss:
        """The loss."""
        return self._function

    def misfit(self, outputs: tuple[TensorSpec, ...]) -> str | None:
        """Nothing: the loss itself takes outputs, or raises."""
        return None

    def examine(self, groups: Sequence[Tensor], outputs: tuple[TensorSpec, ...]) -> None:
        """Find out, on made-up outputs, whether parts of a batch add up to the batch.

        Args:
            groups: Targets of a few samples, as they are kept; several times, since samples that weigh alike tell nothing.
            outputs: Output tensors of the model.

        Raises:
            ConfigError: The loss raises, or does not return a number, or a pair of numbers.
        """
        given, before = self._function, _state_of(self._function)
        try:
            # On a copy: what it is tried on is no batch.
            self._function = copy.deepcopy(given)
            add_up = True
            for targets in groups:
                add_up = self._adds_up(targets, outputs) and add_up
        except ConfigError:
            raise
        except Exception as error:  # whatever a user's function raises is the user's to see
            shapes = ", ".join(str(("batch", *spec.shape)) for spec in outputs)
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"loss {self._title} failed on outputs {shapes} and targets of {len(groups[0])} samples: {type(error).__name__}: {reason}; mend "
                "it"
            ) from error
        finally:
            tried, self._function = self._function, given
        if changed := [name for name, value in _state_of(tried).items() if not _same(value, before.get(name))]:
            raise ConfigError(
                f"loss {self._title} changes its {changed[0]!r} when it is called, which no commit keeps, and once for each part of a batch; "
                "make it a part of the model, in a buffer"
            )
        self.needs_whole_batch = not add_up

    def _adds_up(self, targets: Tensor, outputs: tuple[TensorSpec, ...]) -> bool:
        """Decide whether the parts of one batch give what the batch gives."""
        parts = [slice(0, 1), slice(1, len(targets))]
        made_up = made_up_outputs(outputs, len(targets))
        whole = float(self.loss(made_up, targets, training=True))
        shares = self.shares(targets, parts, outputs)
        pieces = [
            float(self.loss(tuple(tensor[part] for tensor in made_up), targets[part], training=True)) * share
            for part, share in zip(parts, shares, strict=True)
            if share
        ]
        if not any(shares):
            return True  # nothing counts in it, which says nothing
        return abs(sum(pieces) - whole) <= _ROUNDING * max(abs(whole), 1e-12)

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
            if (known := self._mean_over(targets[part])) is not None:
                counts.append(known)
                continue
            size = part.stop - part.start
            _, count = self._call(made_up_outputs(outputs, size), targets[part])
            counts.append(size if count is None else float(count))
            if count is None:
                return [(one.stop - one.start) / len(targets) for one in parts]
        total = sum(counts)
        return [count / total if count else 0.0 for count in counts]

    def task_score_names(self, outputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
        """See `Task.task_score_names`: the loss."""
        return ("loss",)

    def task_scores(self) -> "LossScores":
        """See `Task.task_scores`."""
        return LossScores(self)

    def _mean_over(self, targets: Tensor) -> float | None:
        """Return what PyTorch's own cross entropy takes its mean over: what counts in targets, by its weight; None of other losses."""
        loss = self._function
        if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or type(loss).forward not in _FORWARDS:
            return None
        wanted = self.targets.unpack(targets)
        if loss.reduction != "mean" or not isinstance(wanted, Tensor) or wanted.is_floating_point():
            return None
        counted = wanted.long()
        counted = counted[counted != loss.ignore_index].cpu()
        if loss.weight is None:
            return float(counted.numel())
        weights = loss.weight.detach().to("cpu", torch.float64)
        return float(weights[counted.clamp(0, len(weights) - 1)].sum())  # beyond them the loss itself raises

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


class LossScores(Scores):
    """Mean loss, where nothing else is known of what is learnt.

    Args:
        task: What is measured.
    """

    def __init__(self, task: OwnTask) -> None:
        super().__init__()
        self._task = task

    def add(self, outputs: tuple[Tensor, ...], targets: Tensor) -> None:
        """See `Scores.add`."""
        value, count = self._task._call(outputs, targets.to(outputs[0].device))
        known = self._task._mean_over(targets)
        weight = (len(targets) if known is None else known) if count is None else float(count)
        self._add_loss(float(value) if count is None else float(value) / max(weight, 1e-30), weight)

    def merge(self, other: "LossScores") -> None:
        """See `Scores.merge`."""
        self._merge_loss(other)

    def result(self) -> dict[str, Any]:
        """Return `loss`."""
        return {} if self.loss is None else {"loss": self.loss}


def _state_of(loss: OwnLoss) -> dict[str, Any]:
    """Return what a loss holds: tensors of a module, and plain values of any object."""
    held = dict(loss.state_dict()) if isinstance(loss, nn.Module) else {}
    plain = {
        name: value for name, value in getattr(loss, "__dict__", {}).items() if isinstance(value, int | float | str | Tensor)
    }
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in {**held, **plain}.items()}


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)

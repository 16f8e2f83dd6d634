"""The words of every method: a visit, and the objective of the partition that learns in it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lowmem_pnn.config.fit_config import FitConfig, recovering
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.profiling.costs import Affine

SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Visit:
    """One partition, resident, over some samples, doing one thing.

    Args:
        action: `learn` runs epochs over the samples against the partition's own objective; `emit` runs them forward, without
            gradients, and leaves the next boundary's activations; `backpropagate` runs forward once more and then backward, from the
            gradient that the partition after it left (or from the loss), and leaves one for the partition before; `step` applies
            gradients that were kept; `join` takes over the partitions that other processes have trained.
        partition: its number in the plan.
        split: which part of the data; a sweep's visits get batches of it.
        epochs: passes over the samples, of `learn`.
        epochs_before: of its earlier visits, of `learn`.
        macro_batch: of an epoch's order only these samples, first and after the last; None for all of them.
        view: which of several augmented copies is written, of `emit`.
        commits: the run can be resumed from its end; else only from an earlier one.
        measures: at its end the whole model is measured on the validation split.
        from_synthetic_labels: the inputs of `learn` are the synthetic labels of the boundary before it, instead of activations.
        learns: in a sweep: its weights change, it is in train mode, writes buffers, and steps; else it is frozen, in eval mode.
        returns_input_gradient: a partition before it learns, and needs the gradient of its inputs.
        keeps_gradients: `backpropagate` keeps them for a `step` visit, instead of stepping at once.
    """

    action: Literal["learn", "emit", "backpropagate", "step", "join"]
    partition: int
    split: SplitName
    epochs: int = 1
    epochs_before: int = 0
    macro_batch: tuple[int, int] | None = None
    view: int = 0
    commits: bool = True
    measures: bool = False
    from_synthetic_labels: bool = False
    learns: bool = False
    returns_input_gradient: bool = False
    keeps_gradients: bool = False


@dataclass(frozen=True)
class Sweep:
    """Visits that every batch of an epoch goes through, one after the other: the gradient crosses partitions.

    Args:
        visits: of one batch.
        epochs: passes over the samples.
        batch_size: samples a step.
        phase: a word that its data order and its random choices follow from: `epoch` for training from the start, as `backprop`
            has it.
        fresh_state: the optimizer's state of earlier visits is forgotten at its first step.
        shuffle: every epoch has an order of its own.
    """

    visits: tuple[Visit, ...]
    epochs: int
    batch_size: int
    phase: Literal["epoch", "recovery"] = "epoch"
    fresh_state: bool = False
    shuffle: bool = True

    @property
    def learners(self) -> tuple[int, ...]:
        """The partitions whose weights change, ascending."""
        return tuple(sorted({visit.partition for visit in self.visits if visit.learns}))


def sweep_visits(num_partitions: int, learners: Sequence[int], *, deferred: bool) -> tuple[Visit, ...]:
    """What one batch goes through in exact training, or in recovery.

    Args:
        num_partitions: of the plan.
        learners: the partitions that learn, at least one; the others are frozen.
        deferred: gradients are kept until all of them are there.

    Returns:
        Forward through all partitions but the last, back from the last to the first that learns, then the steps.

    Example:
        >>> [(visit.action, visit.partition) for visit in sweep_visits(3, [1], deferred=False)]
        [('emit', 0), ('emit', 1), ('backpropagate', 2), ('backpropagate', 1)]
    """
    first = min(learners)
    forward = [Visit("emit", number, "train", learns=number in learners) for number in range(num_partitions - 1)]
    back = [
        Visit(
            "backpropagate",
            number,
            "train",
            learns=number in learners,
            returns_input_gradient=number > first,
            keeps_gradients=deferred and number in learners,
        )
        for number in reversed(range(first, num_partitions))
    ]
    steps = [Visit("step", number, "train", learns=True) for number in sorted(learners)] if deferred else []
    return (*forward, *back, *steps)


class Objective(ABC):
    """What a partition's outputs are measured against."""

    per_layer_loss: ClassVar[bool] = False
    """Every layer of the partition has scores, and a loss, of its own; no gradient passes from one to another."""

    @abstractmethod
    def prepare(self, device: torch.device) -> None:
        """Make what the loss needs, on the device; called once per residency."""

    @abstractmethod
    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """The mean loss over a micro-batch.

        Args:
            outputs: the partition's boundary tensors, each (B, ...).
            labels: (B,) int64 class numbers.

        Returns:
            A scalar that can be differentiated.
        """

    def num_correct(self, outputs: tuple[Tensor, ...], labels: Tensor) -> int | None:
        """How many samples are classified rightly, or None where the outputs are no class scores."""
        return None

    @abstractmethod
    def memory(self, output_bytes: int) -> Affine:
        """Device bytes that the objective needs besides outputs and their gradient.

        Args:
            output_bytes: of the partition's outputs, in float32 at least, per sample.
        """


def in_full(tensor: Tensor) -> Tensor:
    """A tensor in float32 at least: a loss is not computed in less."""
    return tensor if tensor.dtype.itemsize >= torch.float32.itemsize else tensor.float()


class Labels(Objective):
    """Mean cross entropy against the true labels, over class scores (B, classes), or (B, T, classes) for tokens.

    Args:
        label_smoothing: of the labels while training (Szegedy et al. 2016, section 7); a measured loss has none.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self._label_smoothing = label_smoothing

    def prepare(self, device: torch.device) -> None:
        """Nothing to make."""

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Cross entropy; `reduction="sum"` is for a micro-batch that is computed in chunks."""
        smoothing = self._label_smoothing if outputs[0].requires_grad else 0.0
        scores = in_full(outputs[0]).flatten(0, -2)
        return nn.functional.cross_entropy(scores, labels.flatten(), reduction=reduction, label_smoothing=smoothing)

    def num_correct(self, outputs: tuple[Tensor, ...], labels: Tensor) -> int:
        """Samples (or tokens) whose highest score is their label's."""
        return int((outputs[0].argmax(-1) == labels).sum())

    def memory(self, output_bytes: int) -> Affine:
        """Log probabilities, and their gradient."""
        return Affine(0, 2 * output_bytes)


class Passing(Objective):
    """No objective of its own: the partition gets its gradient from the one after it."""

    def prepare(self, device: torch.device) -> None:
        """Nothing to make."""

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Never asked for."""
        raise AssertionError("only the last partition of a sweep has a loss")

    def memory(self, output_bytes: int) -> Affine:
        """The gradient that comes in is counted with the layer's own."""
        return Affine(0, 0)


class Method(ABC):
    """A method, for one configuration."""

    def __init__(self, config: FitConfig) -> None:
        self.config = config

    @property
    def num_partitions(self) -> int | None:
        """How many partitions the method asks for, or None to leave it to the planner."""
        return self.config.partitions

    @property
    def sweeps(self) -> bool:
        """Whether all training is in sweeps."""
        return False

    @property
    def learns_per_layer(self) -> bool:
        """Whether every layer has a head, and learns from it alone."""
        return False

    def head(self, chain: Chain, unit: int, num_classes: int, tokens: bool) -> nn.Module | None:
        """The auxiliary head of a layer, with weights drawn from PyTorch's generator; None if it has none.

        Args:
            chain: the model.
            unit: the layer's number.
            num_classes: of the data.
            tokens: each token has a label.
        """
        return None

    @property
    def partitions_are_independent(self) -> bool:
        """Whether partitions learn without anything of each other's, and meet at the end."""
        return False

    @abstractmethod
    def visits(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """The training, as data.

        Args:
            num_partitions: of the plan.
            splits: the parts of the training data: `train`, and `val` where there is one; with their sizes where they are known.
        """

    def program(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """`visits`, and the recovery epochs after them (PNN, section 5).

        Args:
            num_partitions: of the plan.
            splits: the parts of the training data.
        """
        visits = self.visits(num_partitions, splits)
        if self.config.recovery_epochs:
            learners = recovering(self.config, num_partitions)
            visits.append(
                Sweep(
                    sweep_visits(num_partitions, learners, deferred=self.config.steps_wait),
                    self.config.recovery_epochs,
                    self.config.value_for("batch_size", num_partitions - 1),
                    phase="recovery",
                    fresh_state=True,
                    shuffle=self.config.value_for("shuffle", num_partitions - 1),
                )
            )
        return visits

    @abstractmethod
    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], num_classes: int) -> Objective:
        """What a partition learns.

        Args:
            partition: its number.
            num_partitions: of the plan.
            boundary: the partition's output tensors.
            num_classes: of the data.
        """


def share_of(program: Sequence[Visit | Sweep], rank: int, ranks: int) -> list[Visit | Sweep]:
    """What one of several processes does of a program whose partitions train apart: its own, and the first one all that follows.

    Args:
        program: of the whole run.
        rank: of the process, from 0.
        ranks: how many there are; with 1 it does everything.

    Example:
        >>> program = [Visit("learn", 0, "train"), Visit("learn", 1, "train", from_synthetic_labels=True)]
        >>> [(visit.action, visit.partition) for visit in share_of(program, 0, 2)]
        [('learn', 0), ('join', 0)]
    """
    if ranks == 1:
        return list(program)
    own: list[Visit | Sweep] = [item for item in program if isinstance(item, Visit) and item.partition == rank]
    return own if rank else [*own, Visit("join", 0, "train"), *(item for item in program if isinstance(item, Sweep))]


def evaluation(num_partitions: int, split: SplitName = "test") -> list[Visit]:
    """The visits that measure a trained model: each partition once, forward."""
    return [Visit("emit", partition, split) for partition in range(num_partitions)]

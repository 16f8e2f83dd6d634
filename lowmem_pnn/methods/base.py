"""The interface of a training method: its program of visits and sweeps, and the objective of each partition."""

from abc import ABC, abstractmethod
from collections.abc import Collection

from torch import nn

from lowmem_pnn.config.fit_config import FitConfig, recovering
from lowmem_pnn.methods.objectives import Objective
from lowmem_pnn.methods.visits import SplitName, Sweep, Visit, sweep_visits
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.tasks.task import Task


class Method(ABC):
    """A training method under one configuration."""

    def __init__(self, config: FitConfig) -> None:
        self.config = config

    @property
    def num_partitions(self) -> int | None:
        """Number of partitions that the method asks for; None leaves the number to the planner."""
        return self.config.partitions

    @property
    def sweeps(self) -> bool:
        """Whether all training is in sweeps."""
        return False

    @property
    def learns_per_layer(self) -> bool:
        """Whether every layer learns from the loss of its own auxiliary head alone."""
        return False

    def head(self, chain: Chain, layer: int, num_outputs: int, tokens: bool) -> nn.Module | None:
        """Make the auxiliary head of a layer, with weights drawn from PyTorch's generator.

        Args:
            chain: Chain of the model.
            layer: Number of the layer.
            num_outputs: Outputs of the head: classes, labels, or values.
            tokens: Whether each token has a label.

        Returns:
            The head; None where the layer has none.
        """
        return None

    @property
    def incubates(self) -> bool:
        """Whether partitions learn inside a meta model, and are put together at the end."""
        return False

    @property
    def partitions_are_independent(self) -> bool:
        """Whether a partition learns without anything from other partitions, so that they can be trained in parallel."""
        return False

    @abstractmethod
    def visits(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """Return the training, without recovery, as data.

        Args:
            num_partitions: Number of partitions in the plan.
            splits: Splits that training reads: `train`, and `val` where there is one; a mapping to their sizes where these are known.
        """

    def program(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """Return `visits`, followed by the sweeps of the recovery epochs (PNN, section 5).

        Args:
            num_partitions: Number of partitions in the plan.
            splits: Splits that training reads, as for `visits`.
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
    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], task: Task) -> Objective:
        """Return the objective of a partition.

        Args:
            partition: Number of the partition.
            num_partitions: Number of partitions in the plan.
            boundary: Output tensors of the partition.
            task: What the model learns.
        """

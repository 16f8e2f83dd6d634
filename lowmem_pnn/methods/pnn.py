"""`pnn`: partitions trained one after the other on synthetic intermediate labels (Karadağ and Topaloğlu, arXiv 2403.11204).

    boundary 0          boundary 1              boundary K
    images --[ p0 ]-- activations --[ p1 ]-- ... --[ pK-1 ]-- class scores
                |                     |                |
               SIL 1                 SIL 2           labels

Partition k < K-1 regresses to one random vector per class; then its outputs are written once, as the inputs of partition k+1. The
last partition learns the true labels (section 2, figures 3 and 4).

With `--parallel-sil` (figure 5) no partition waits for another: the inputs of a partition are the synthetic labels of the boundary
before it.

    images --[ p0 ]-- SIL 1    SIL 1 --[ p1 ]-- SIL 2    SIL 2 --[ p2 ]-- labels
"""

from collections.abc import Collection

from lowmem_pnn.methods.base import Method
from lowmem_pnn.methods.objectives import Objective, TaskObjective
from lowmem_pnn.methods.sil import SyntheticLabels
from lowmem_pnn.methods.visits import SplitName, Sweep, Visit
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.tasks.task import Task


class Pnn(Method):
    """PNN training: one partition after the other, each with its own epochs, batch size, optimizer, learning rate and data order."""

    @property
    def partitions_are_independent(self) -> bool:
        """Whether `parallel_sil` is set."""
        return self.config.parallel_sil

    def visits(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """Return for each partition a `learn` visit of its epochs, then an `emit` visit for each split if the next partition reads them."""
        visits: list[Visit | Sweep] = []
        for partition in range(num_partitions):
            epochs = self.config.value_for("epochs", partition)
            visits.append(
                Visit(
                    "learn", partition, "train", epochs, from_synthetic_labels=self.partitions_are_independent and partition > 0
                )
            )
            if partition < num_partitions - 1 and not self.partitions_are_independent:
                visits += [Visit("emit", partition, split) for split in splits]
        return visits

    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], task: Task) -> Objective:
        """Return the loss against the true labels for the last partition, against synthetic intermediate labels for the others."""
        if partition == num_partitions - 1:
            return TaskObjective(task, boundary)
        return SyntheticLabels(
            boundary,
            task.targets.num_classes,
            self.config.value_for("kappa", partition),
            seed_of(self.config.seed, "sil", partition + 1),
            self.config.sil,
            self.config.sil_target,
            task.ignored,
            takes_all=self.config.parallel_sil,
        )

"""`pnn`: partitions trained one after the other on synthetic intermediate labels (Karadağ and Topaloğlu, arXiv 2403.11204).

    boundary 0          boundary 1              boundary K
    images --[ p0 ]-- activations --[ p1 ]-- ... --[ pK-1 ]-- class scores
                |                     |                |
               SIL 1                 SIL 2           labels

Partition k < K-1 regresses to one random code per class, then its outputs are written once and become the inputs of partition k+1;
the last partition learns the true labels (section 2, figures 3 and 4).

With `--parallel-sil` (figure 5) no partition waits for another: its inputs are the codes of the boundary before it.

    images --[ p0 ]-- SIL 1    SIL 1 --[ p1 ]-- SIL 2    SIL 2 --[ p2 ]-- labels
"""

from collections.abc import Collection

from lowmem_pnn.methods.base import Labels, Method, Objective, SplitName, Sweep, Visit
from lowmem_pnn.methods.sil import SyntheticLabels
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.seeds import seed_of


class Pnn(Method):
    """Partition after partition, each with its own epochs, batch, optimizer, learning rate and order of samples."""

    @property
    def partitions_are_independent(self) -> bool:
        """With `parallel_sil`."""
        return self.config.parallel_sil

    def visits(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """For each partition: learn for its epochs; then, but for the last, write its outputs once, if the next one reads them."""
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

    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], num_classes: int) -> Objective:
        """Synthetic intermediate labels, and the true ones at the end."""
        if partition == num_partitions - 1:
            return Labels(self.config.label_smoothing)
        return SyntheticLabels(
            boundary,
            num_classes,
            self.config.value_for("kappa", partition),
            seed_of(self.config.seed, "sil", partition + 1),
            self.config.sil,
            self.config.sil_target,
        )

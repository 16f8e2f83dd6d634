"""`exact`: ordinary training, one partition on the device at a time. The gradient crosses partitions.

    batch --[ p0 ]--> b1 --[ p1 ]--> b2 --[ p2 ]--> loss       forward: only boundaries are kept
            [ p0 ]<-- g1 --[ p1 ]<-- g2 --[ p2 ]<--            backward: each partition runs forward once more, then back

All micro-batches of a batch go through a partition before the next one is loaded, so that its weights are read once for all of them
(the vertical schedule of L2L, Pudipeddi et al. 2020). Each partition steps as soon as its gradients are complete; with gradient
clipping, whose norm is over all partitions, and in fp16, where any of them may overflow, gradients are kept on disk until the last of
them is there: 4 bytes a weight more are written, 8 more are read (the gradient, and the weight once more).

Losses and weights are those of plain PyTorch, bit for bit, on the CPU in float32.
"""

from collections.abc import Collection

from lowmem_pnn.methods.base import Labels, Method, Objective, Passing, SplitName, Sweep, Visit, sweep_visits
from lowmem_pnn.model.chain import TensorSpec


class Exact(Method):
    """Every batch goes forward through all partitions and back."""

    @property
    def sweeps(self) -> bool:
        """Always."""
        return True

    def visits(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """One sweep of all epochs."""
        learners = range(num_partitions)
        config = self.config
        visits = sweep_visits(num_partitions, learners, deferred=config.steps_wait)
        shuffle = config.value_for("shuffle", 0)
        return [Sweep(visits, config.value_for("epochs", 0), config.value_for("batch_size", 0), shuffle=shuffle)]

    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], num_classes: int) -> Objective:
        """The true labels, at the end."""
        return Labels(self.config.label_smoothing) if partition == num_partitions - 1 else Passing()

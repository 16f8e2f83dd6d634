"""`exact`: ordinary training with one partition on the device at a time; the gradient crosses partitions.

    batch --[ p0 ]--> b1 --[ p1 ]--> b2 --[ p2 ]--> loss       forward: only boundary tensors are kept
            [ p0 ]<-- g1 --[ p1 ]<-- g2 --[ p2 ]<--            backward: each partition runs forward once more, then back

All micro-batches of a batch go through a partition before the next one is loaded, so that its weights are read once for all of them
(the vertical schedule of L2L, Pudipeddi et al. 2020). Each partition steps as soon as its gradients are complete; with gradient
clipping, whose norm is over all partitions, and in fp16, where any of them may overflow, gradients are kept on disk until the last
one is complete: 4 bytes more per weight are written, 8 more are read (the gradient, and the weight once more).

On the CPU in float32, losses and weights equal those of plain PyTorch bit for bit.
"""

from collections.abc import Collection

from lowmem_pnn.methods.base import Method
from lowmem_pnn.methods.objectives import NoObjective, Objective, TaskObjective
from lowmem_pnn.methods.visits import SplitName, Sweep, Visit, sweep_visits
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.tasks.task import Task


class Exact(Method):
    """Exact training: every batch goes forward through all partitions and back."""

    @property
    def sweeps(self) -> bool:
        """Always True."""
        return True

    def visits(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """Return one sweep of all epochs."""
        learners = range(num_partitions)
        config = self.config
        visits = sweep_visits(num_partitions, learners, deferred=config.steps_wait)
        shuffle = config.value_for("shuffle", 0)
        return [Sweep(visits, config.value_for("epochs", 0), config.value_for("batch_size", 0), shuffle=shuffle)]

    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], task: Task) -> Objective:
        """Return the loss against the true labels for the last partition, no objective for the others."""
        return TaskObjective(task, boundary) if partition == num_partitions - 1 else NoObjective()

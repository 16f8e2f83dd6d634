"""`backprop`: ordinary training with the whole model on the device; the baseline, within the same budget."""

from collections.abc import Collection

from lowmem_pnn.methods.base import Method
from lowmem_pnn.methods.objectives import Objective, TaskObjective
from lowmem_pnn.methods.visits import SplitName, Sweep, Visit
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.tasks.task import Task


class Backprop(Method):
    """The whole model as one partition, trained on the true labels."""

    @property
    def num_partitions(self) -> int:
        """Always 1."""
        return 1

    def visits(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """Return one `learn` visit of all epochs; a trained model that is cut for a smaller budget is not visited like this again."""
        return [Visit("learn", 0, "train", self.config.value_for("epochs", 0))]

    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], task: Task) -> Objective:
        """Return the loss against the true labels."""
        return TaskObjective(task, boundary)

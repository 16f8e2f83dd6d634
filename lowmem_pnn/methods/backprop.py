"""`backprop`: ordinary training, the whole model on the device: the baseline, inside the same budget."""

from collections.abc import Collection

from lowmem_pnn.methods.base import Labels, Method, Objective, SplitName, Sweep, Visit
from lowmem_pnn.model.chain import TensorSpec


class Backprop(Method):
    """One partition that learns the true labels."""

    @property
    def num_partitions(self) -> int:
        """Always one."""
        return 1

    def visits(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """One visit of all epochs."""
        assert num_partitions == 1
        return [Visit("learn", 0, "train", self.config.value_for("epochs", 0))]

    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], num_classes: int) -> Objective:
        """The true labels."""
        return Labels(self.config.label_smoothing)

"""`incubate`: partitions that learn one after the other inside a thin model of the whole (Deep Incubation, arXiv 2212.04129).

    meta model, trained once end to end    x --[t0]-- m1 --[t1]-- m2 --[t2]--> scores
    partition 0                            x --[    p0    ]-->[t1]-->[t2]--> loss          t1, t2 frozen
    partition 1                                       m1 --[    p1    ]-->[t2]--> loss     m1 is written once
    partition 2                                                  m2 --[    p2    ]--> loss
    assembly, then recovery by sweeps      x --[p0]--[p1]--[p2]--> scores

The meta model has a thin part for each partition. Its parts never change again, so that the inputs of a partition are written once,
and no partition waits for what another has learnt; its loss is the model's own, through the thin parts after it.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from lowmem_pnn.methods.base import Method
from lowmem_pnn.methods.objectives import Objective, TaskObjective
from lowmem_pnn.methods.visits import SplitName, Sweep, Visit
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.profiling.costs import Affine
from lowmem_pnn.tasks.task import Task


class ThroughTail(TaskObjective):
    """The task's own loss of what frozen thin parts, the tail, make of a partition's outputs.

    Args:
        task: Task of the run.
        outputs: Output tensors of the partition.
    """

    def __init__(self, task: Task, outputs: tuple[TensorSpec, ...]) -> None:
        super().__init__(task, outputs)
        self._tail: Sequence[Layer] = ()
        self._read: Callable[[int, str], Tensor] | None = None
        self._tensors: list[dict[str, Tensor]] = []

    def attach(self, tail: Sequence[Layer], outputs: tuple[TensorSpec, ...], read: Callable[[int, str], Tensor]) -> None:
        """Set the tail that the loss goes through.

        Args:
            tail: Layers after the partition, to the model's outputs; nothing of them is changed but their mode.
            outputs: Output tensors of the model.
            read: Returns the value of a layer's tensor, on the host, by the layer's position in the tail and the tensor's name.
        """
        self._tail, self._outputs, self._read = tail, outputs, read

    def prepare(self, device: torch.device) -> None:
        """Bring the tail's weights onto the device, in eval mode and without gradients."""
        assert self._read is not None, "the tail is attached"
        self._tensors = []
        for number, layer in enumerate(self._tail):
            layer.eval()
            names = [*layer.parameters(), *layer.buffers()]
            self._tensors.append({name: self._read(number, name).to(device) for name in names})

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Return the task's mean loss of the tail's outputs."""
        return super().loss(self._through(outputs), labels)

    def num_correct(self, outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[int, int] | None:
        """See `Objective.num_correct`: of the tail's outputs."""
        return super().num_correct(self._through(outputs), labels)

    def memory(self, output_bytes: int) -> Affine:
        """Return nothing: the tail, and the loss behind it, are counted by whoever knows the cuts (`planning.incubation`)."""
        return Affine(0, 0)

    def _through(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for layer, tensors in zip(self._tail, self._tensors, strict=True):
            outputs = layer.run_on(dict(tensors), *outputs)
        return outputs


class Incubate(Method):
    """Deep Incubation: a meta model, then one partition after the other inside of it, then the assembled model."""

    @property
    def incubates(self) -> bool:
        """Always True."""
        return True

    def visits(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """Return the training of the meta model; then for each partition its own, and the writing of the next one's inputs.

        A single partition is the whole model: it needs no meta model.
        """
        if num_partitions == 1:
            return [Visit("learn", 0, "train", self.config.value_for("epochs", 0))]
        visits: list[Visit | Sweep] = [Visit("meta", 0, "train", self.config.num_meta_epochs)]
        for partition in range(num_partitions):
            visits.append(Visit("learn", partition, "train", self.config.value_for("epochs", partition), thin=True))
            if partition < num_partitions - 1:
                visits += [Visit("emit", partition, "train", view=view, thin=True) for view in range(self.config.views)]
                visits += [Visit("emit", partition, split, thin=True) for split in splits if split != "train"]
        return visits

    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], task: Task) -> Objective:
        """Return the loss against the true targets: of the last partition's outputs, or through the thin parts after a partition."""
        return (TaskObjective if partition == num_partitions - 1 else ThroughTail)(task, boundary)

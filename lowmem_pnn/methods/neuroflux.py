"""`neuroflux`: adaptive local learning (NeuroFlux, arXiv 2402.14139): every layer learns from a loss of its own.

    block 1                                    disk          block 2
    x --[layer]--> --[layer]--> --[layer]--> activations --> --[layer]--> --[layer]--> scores
           |           |           |                            |
         head        head        head                         head         a loss each; no gradient passes an arrow

A block is a partition; one block at a time is on the device, with its heads. Inside a block the backward of a layer is done before the
next layer runs forward, so that a block holds the activations of its largest layer alone, whatever its depth. When a block is trained
its outputs are written once, and the block is never run again. The last layer of the chain gives the model's own class scores; every
other layer is an early exit.
"""

from collections.abc import Collection, Mapping
from typing import Literal

from torch import Tensor, nn

from lowmem_pnn.methods.base import Method
from lowmem_pnn.methods.heads import make_head
from lowmem_pnn.methods.objectives import Objective, TaskObjective
from lowmem_pnn.methods.similarity import SIMILARITY_WEIGHT, SimilarityHead, similarity_loss
from lowmem_pnn.methods.visits import SplitName, Sweep, Visit
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.profiling.costs import Affine
from lowmem_pnn.tasks.task import Task

_FLOAT_BYTES = 4
LocalLoss = Literal["cross-entropy", "similarity", "both"]


class LocalObjective(TaskObjective):
    """The task's own loss, against the true targets, for the outputs of every layer's head; with similarity matching beside it.

    Args:
        task: Task of the run.
        outputs: Output tensors of the partition.
        kind: Losses of a layer that has features (`methods.similarity`).
        most: Most samples that are compared with each other.
    """

    per_layer_loss = True

    def __init__(self, task: Task, outputs: tuple[TensorSpec, ...], kind: LocalLoss = "cross-entropy", most: int = 0) -> None:
        super().__init__(task, outputs)
        self._kind, self._most = kind, most

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Return the task's mean loss, and that of similarity matching where there are features beside the scores."""
        scores, *features = outputs
        loss = super().loss((scores,), labels)
        if not features:
            return loss
        matching = similarity_loss(features[0], labels, self.task.targets.num_classes, self.task.ignored)
        if self._kind == "similarity":
            return matching + loss
        return SIMILARITY_WEIGHT * matching + (1 - SIMILARITY_WEIGHT) * loss

    def memory(self, output_bytes: int) -> Affine:
        """Return the bytes of what the loss makes of one head's outputs at a time, and of its gradient."""
        memory = self.task.memory(_FLOAT_BYTES * (self.task.head_size or 0))
        if self._kind == "cross-entropy":
            return memory
        # Two matrices of cosines, their difference, and gradients; the targets' vectors.
        compared = _FLOAT_BYTES * (6 * self._most + 4 * self.task.targets.num_classes)
        return Affine(memory.fixed, memory.per_sample + compared)


class NeuroFlux(Method):
    """NeuroFlux training: one block after the other; inside a block every layer learns from its own head."""

    @property
    def learns_per_layer(self) -> bool:
        """Always True."""
        return True

    def visits(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """Return the visits in the order that `--visits` names.

        - `sequential`: Each block learns for all its epochs, then writes its outputs once, in as many views as configured: of augmented
          samples where there are several, of samples as they are where there is one.
        - `laps=L`: The same L times over, with an L-th of the epochs each.
        - `interleaved`: Each macro-batch of an epoch goes through all blocks; a block learns from a macro-batch, then writes its
          outputs for the next block.
        """
        if self.config.visits == "interleaved":
            assert isinstance(splits, Mapping), "the sizes of the splits are known"
            return self._interleaved(num_partitions, splits)
        visits: list[Visit | Sweep] = []
        laps = self.config.laps
        for lap in range(laps):
            for partition in range(num_partitions):
                epochs = self.config.value_for("epochs", partition)
                before, after = epochs * lap // laps, epochs * (lap + 1) // laps
                visits.append(Visit("learn", partition, "train", after - before, epochs_before=before))
                if partition < num_partitions - 1:
                    visits += [Visit("emit", partition, "train", view=view) for view in range(self.config.views)]
                    visits += [Visit("emit", partition, split) for split in splits if split != "train"]
        return visits

    def _interleaved(self, num_partitions: int, splits: Mapping[SplitName, int]) -> list[Visit | Sweep]:
        visits: list[Visit | Sweep] = []
        samples, last = splits["train"], num_partitions - 1
        size = self.config.macro_batches * max(self.config.batch_sizes)
        for epoch in range(self.config.value_for("epochs", 0)):
            for begin in range(0, samples, size):
                macro_batch = (begin, min(begin + size, samples))
                for partition in range(num_partitions):
                    is_last = partition == last
                    visits.append(
                        Visit(
                            "learn",
                            partition,
                            "train",
                            1,
                            epochs_before=epoch,
                            macro_batch=macro_batch,
                            commits=is_last,
                            ends_epoch=is_last and macro_batch[1] == samples,
                        )
                    )
                    if not is_last:
                        visits.append(
                            Visit("emit", partition, "train", epochs_before=epoch, macro_batch=macro_batch, commits=False)
                        )
        return visits

    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], task: Task) -> Objective:
        """Return the loss against the true labels, for every layer."""
        return LocalObjective(task, boundary, self.config.local_loss, max(self.config.batch_sizes))

    def head(self, chain: Chain, layer: int, num_outputs: int, tokens: bool) -> nn.Module | None:
        """Make the head of a layer; None for the last layer, which gives the model's own class scores."""
        if layer == len(chain.layers) - 1:
            return None
        (boundary,) = chain.laid_out[layer + 1]
        later = [spec for (spec,) in chain.laid_out[layer + 2 : -1]]
        head = make_head(self.config.heads, boundary, later, num_outputs, tokens)
        if self.config.local_loss == "cross-entropy":
            return head
        return SimilarityHead(head, boundary, scores_teach=self.config.local_loss == "both")

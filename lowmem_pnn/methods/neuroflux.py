"""`neuroflux`: adaptive local learning (NeuroFlux, arXiv 2402.14139): every unit learns from a loss of its own.

    block 1                                 disk          block 2
    x --[unit]--> --[unit]--> --[unit]--> activations --> --[unit]--> --[unit]--> scores
           |          |          |                          |
         head       head       head                       head          a loss each; no gradient passes an arrow

A block is a partition; one is on the device at a time, with its heads. Inside it a unit's backward is done before the next unit runs
forward, so that a block holds the activations of its largest unit alone, whatever its depth. When a block is trained its outputs are
written once, and it is never run again. The chain's last unit has the model's own scores; every other unit is an early exit.
"""

from collections.abc import Collection, Mapping

from torch import nn

from lowmem_pnn.methods.base import Labels, Method, Objective, SplitName, Sweep, Visit
from lowmem_pnn.methods.heads import make_head
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.profiling.costs import Affine

_FLOAT_BYTES = 4


class LocalLabels(Labels):
    """The true labels, against the scores of every unit's head.

    Args:
        label_smoothing: of the labels while training.
        num_classes: of the data.
    """

    per_layer_loss = True

    def __init__(self, label_smoothing: float, num_classes: int) -> None:
        super().__init__(label_smoothing)
        self._num_classes = num_classes

    def memory(self, output_bytes: int) -> Affine:
        """Log probabilities, and their gradient, of one head at a time."""
        return Affine(0, 2 * _FLOAT_BYTES * self._num_classes)


class NeuroFlux(Method):
    """Block after block; inside a block all units learn, each from its own head."""

    @property
    def learns_per_layer(self) -> bool:
        """Always."""
        return True

    def visits(self, num_partitions: int, splits: Collection[SplitName]) -> list[Visit | Sweep]:
        """As `--visits` says.

        sequential: each block learns for all its epochs, then writes its outputs once, in as many views as asked. laps=L: the same L
        times over, with an L-th of the epochs each. interleaved: a macro-batch of an epoch goes through one block after the other:
        learn, write; then the next macro-batch.
        """
        if self.config.visits == "interleaved":
            assert isinstance(splits, Mapping), "the number of samples is known"
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
                    ends = partition == last
                    measures = ends and macro_batch[1] == samples and "val" in splits
                    visits.append(
                        Visit(
                            "learn",
                            partition,
                            "train",
                            1,
                            epochs_before=epoch,
                            macro_batch=macro_batch,
                            commits=ends,
                            measures=measures,
                        )
                    )
                    if not ends:
                        visits.append(
                            Visit("emit", partition, "train", epochs_before=epoch, macro_batch=macro_batch, commits=False)
                        )
        return visits

    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], num_classes: int) -> Objective:
        """The true labels, for every unit."""
        return LocalLabels(self.config.label_smoothing, num_classes)

    def head(self, chain: Chain, unit: int, num_classes: int, tokens: bool) -> nn.Module | None:
        """The head of a unit; None for the last, which gives the model's own scores."""
        if unit == len(chain.layers) - 1:
            return None
        (boundary,) = chain.boundaries[unit + 1]
        later = [spec for (spec,) in chain.boundaries[unit + 2 : -1]]
        return make_head(self.config.heads, boundary, later, num_classes, tokens)

"""`pnn`: partitions trained one after the other on synthetic intermediate labels (Karadağ and Topaloğlu, arXiv 2403.11204).

    boundary 0          boundary 1              boundary K
    images --[ p0 ]-- activations --[ p1 ]-- ... --[ pK-1 ]-- class scores
                |                     |                |
               SIL 1                 SIL 2           labels

Partition k < K-1 regresses to one random code per class, then its outputs are written once and become the inputs of partition k+1;
the last partition learns the true labels (section 2, figures 3 and 4).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowmem_pnn.chain import TensorSpec
from lowmem_pnn.costs import Affine
from lowmem_pnn.methods.base import Labels, Method, Objective, Split, Sweep, Visit
from lowmem_pnn.seeds import seed_of


class SyntheticLabels(Objective):
    """Mean squared error against one random code per class: SIL[class] ~ kappa * U(0, 1), equation 1 of the paper.

    Args:
        boundary: the tensors at the cut; each gets codes of its own shape.
        num_classes: how many codes.
        kappa: scale of the codes.
        seed: of the codes.
    """

    def __init__(self, boundary: tuple[TensorSpec, ...], num_classes: int, kappa: float, seed: int) -> None:
        self._boundary = boundary
        self._num_classes = num_classes
        self._kappa = kappa
        self._seed = seed
        self._codes: tuple[Tensor, ...] = ()
        self._learnt: tuple[bool, ...] | None = None

    def prepare(self, device: torch.device) -> None:
        """Draw the codes, on the host, so that every device sees the same."""
        generator = torch.Generator().manual_seed(self._seed)
        self._codes = tuple(
            torch.rand(self._num_classes, *spec.shape, generator=generator).mul_(self._kappa).to(device)
            for spec in self._boundary
        )

    @property
    def codes(self) -> tuple[Tensor, ...]:
        """One tensor (classes, ...) per boundary tensor."""
        return self._codes

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Mean squared error over the elements of the tensors that this partition computes.

        A tensor that only passes through (the input of a later skip connection, say) has no gradient here and does not count; nor
        does it when the loss is measured after training.
        """
        if any(output.requires_grad for output in outputs):
            self._learnt = tuple(output.requires_grad for output in outputs)
        chosen = self._learnt or tuple(output.is_floating_point() for output in outputs)
        pairs = [(output, codes) for output, codes, counts in zip(outputs, self._codes, chosen, strict=True) if counts]
        if len(pairs) == 1:
            return nn.functional.mse_loss(pairs[0][0], pairs[0][1][labels])
        elements = sum(output.numel() for output, _ in pairs)
        losses = [nn.functional.mse_loss(output, codes[labels], reduction="sum") for output, codes in pairs]
        return torch.stack(losses).sum() / elements

    def memory(self, output_bytes: int) -> Affine:
        """The codes; and per sample the targets, the difference and its gradient."""
        return Affine(self._num_classes * output_bytes, 3 * output_bytes)


class Pnn(Method):
    """Partition after partition, each with its own epochs, batch and learning rate."""

    def visits(self, num_partitions: int, splits: Sequence[Split]) -> list[Visit | Sweep]:
        """For each partition: learn for its epochs; then, but for the last, write its outputs once."""
        visits: list[Visit | Sweep] = []
        for partition in range(num_partitions):
            visits.append(Visit("learn", partition, "train", self.config.value_for("epochs", partition)))
            if partition < num_partitions - 1:
                visits += [Visit("emit", partition, split) for split in splits]
        return visits

    def objective(self, partition: int, num_partitions: int, boundary: tuple[TensorSpec, ...], num_classes: int) -> Objective:
        """Synthetic intermediate labels, and the true ones at the end."""
        if partition == num_partitions - 1:
            return Labels(self.config.label_smoothing)
        kappa = self.config.value_for("kappa", partition)
        return SyntheticLabels(boundary, num_classes, kappa, seed_of(self.config.seed, "sil", partition + 1))

"""Synthetic intermediate labels (SIL): one random vector per class, which the outputs of a partition regress to.

Equation 1 of the paper (Karadağ and Topaloğlu, arXiv 2403.11204): SIL[class] = kappa * U(0, 1), drawn once per boundary. `normal` and
`orthogonal` have the same mean, kappa / 2, and the same standard deviation, kappa / sqrt(12), so that nothing else differs.

`sparse` is ours: a fifth of the elements of a class vector are kappa, the others 0. So each element of the partition's outputs learns to
tell a fifth of the classes from the others, as far apart as kappa allows, where uniform vectors ask for 47 values in between. What it comes to
beside other vectors, those that follow class means among them, is in `bench/results/pnn_labels.md`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lowmem_pnn.errors import DataError
from lowmem_pnn.methods.objectives import Objective
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.profiling.costs import Affine
from lowmem_pnn.sources.targets import PYTORCH_IGNORED
from lowmem_pnn.tasks.task import at_least_float32

Distribution = Literal["uniform", "normal", "orthogonal", "sparse"]
Target = Literal["full", "pooled"]

_DENSITY = 0.2
# Peak memory of drawing, in multiples of the class vectors' own bytes: measured.
_DRAWING_FACTOR = {"uniform": 1, "sparse": 2, "normal": 3, "orthogonal": 6}
_MEAN, _DEVIATION = 0.5, 1 / math.sqrt(12)  # of U(0, 1)


def draw_class_vectors(
    shapes: Sequence[tuple[int, ...]], num_classes: int, kappa: float, seed: int, distribution: Distribution = "uniform"
) -> tuple[Tensor, ...]:
    """Draw one vector per class for each tensor of a boundary.

    Args:
        shapes: Shapes of the tensors' vectors, for one class.
        num_classes: Number of vectors per tensor.
        kappa: Scale of the vectors.
        seed: Seed of the generator that all vectors are drawn from.
        distribution: `uniform` or `normal` elements; `orthogonal`: the deviations of the classes from the mean are orthogonal and equally
            long, so that all classes are equally far apart (where there are at least as many elements as classes); or `sparse`
            elements, 1 with a probability of a fifth, else 0.

    Returns:
        Tensors (classes, ...) on the CPU, float32.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = []
    for shape in shapes:
        if distribution == "uniform":
            drawn = torch.rand(num_classes, *shape, generator=generator)
        elif distribution == "sparse":
            drawn = (torch.rand(num_classes, *shape, generator=generator) < _DENSITY).float()
        else:
            deviations = torch.randn(num_classes, math.prod(shape), generator=generator)
            if distribution == "orthogonal":
                # Orthonormal rows, or columns where there are more classes than elements; then scaled to unit deviation.
                wide = deviations.shape[0] <= deviations.shape[1]
                basis = torch.linalg.qr(deviations.T if wide else deviations).Q
                deviations = (basis.T if wide else basis) * math.sqrt(max(deviations.shape))
            drawn = (_MEAN + _DEVIATION * deviations).reshape(num_classes, *shape)
        vectors.append(drawn.mul_(kappa))
    return tuple(vectors)


def refuse_left_out(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that have no class vector, where class vectors are what a partition learns from.

    Args:
        labels: Class numbers (B,).
        num_classes: Number of class vectors.

    Raises:
        DataError: A label is no class.
    """
    unknown = labels[(labels < 0) | (labels >= num_classes)]
    if len(unknown):
        raise DataError(
            f"label {int(unknown[0])} is none of the {num_classes} classes, and --parallel-sil learns from the vectors of the classes; leave "
            "the samples that have it out of the data, or leave --parallel-sil out"
        )


class SyntheticLabels(Objective):
    """Mean squared error against the vectors of the samples' classes; samples whose label is left out do not count.

    Args:
        boundary: Tensors at the cut; each has class vectors of its own.
        num_classes: Number of classes.
        kappa: Scale of the class vectors.
        seed: Seed of the class vectors.
        distribution: Distribution of the class vectors' elements.
        target: `full` compares whole tensors; `pooled` compares means over positions: of maps (C, H, W) one value per channel, of
            tokens (T, D) one per feature; of vectors it equals `full`. Which axis has them the boundary says, where it is known.
        ignored: Class number that is left out, as the task's own loss has it.
        takes_all: Whether every sample needs a class vector, since the next partition has it for an input.
    """

    def __init__(
        self,
        boundary: tuple[TensorSpec, ...],
        num_classes: int,
        kappa: float,
        seed: int,
        distribution: Distribution = "uniform",
        target: Target = "full",
        ignored: int = PYTORCH_IGNORED,
        *,
        takes_all: bool = False,
    ) -> None:
        self._shapes = tuple(_pooled_shape(spec) if target == "pooled" else spec.shape for spec in boundary)
        self._bytes_per_class = sum(math.prod(shape) for shape in self._shapes) * torch.float32.itemsize
        self._num_classes = num_classes
        self._kappa = kappa
        self._seed = seed
        self._distribution: Distribution = distribution
        self._pools, self._boundary = target == "pooled", boundary
        self._ignored, self._takes_all = ignored, takes_all
        self._class_vectors: tuple[Tensor, ...] = ()
        # Which output tensors the partition computes, as the first training step shows.
        self._is_computed: tuple[bool, ...] | None = None

    def prepare(self, device: torch.device) -> None:
        """Draw the class vectors, on the host, so that every device gets the same."""
        vectors = draw_class_vectors(self._shapes, self._num_classes, self._kappa, self._seed, self._distribution)
        self._class_vectors = tuple(tensor.to(device) for tensor in vectors)

    @property
    def class_vectors(self) -> tuple[Tensor, ...]:
        """Class vectors of each boundary tensor, (classes, ...)."""
        return self._class_vectors

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Return the mean squared error over the elements of the tensors that this partition computes.

        A tensor that only passes through (the input of a later skip connection, say) has no gradient here and does not count; nor
        does it count when the loss is evaluated after training.
        """
        if any(output.requires_grad for output in outputs):
            self._is_computed = tuple(output.requires_grad for output in outputs)
        counted = self._is_computed or tuple(output.is_floating_point() for output in outputs)
        if self._pools:
            outputs = tuple(
                _pool(output, spec) if counts else output
                for output, spec, counts in zip(outputs, self._boundary, counted, strict=True)
            )
        pairs = [
            (output, vectors) for output, vectors, counts in zip(outputs, self._class_vectors, counted, strict=True) if counts
        ]
        left_out = labels == self._ignored
        if bool(left_out.any()):
            return self._loss_of_some(pairs, labels, left_out)
        if len(pairs) == 1:
            return nn.functional.mse_loss(at_least_float32(pairs[0][0]), pairs[0][1][labels])
        elements = sum(output.numel() for output, _ in pairs)
        losses = [nn.functional.mse_loss(at_least_float32(output), vectors[labels], reduction="sum") for output, vectors in pairs]
        return torch.stack(losses).sum() / elements

    @staticmethod
    def _loss_of_some(pairs: Sequence[tuple[Tensor, Tensor]], labels: Tensor, left_out: Tensor) -> Tensor:
        """Return the mean over the samples that are not left out: these are compared with themselves, without memory for a copy of all."""
        losses, elements = [], 0
        for output, vectors in pairs:
            output = at_least_float32(output)
            targets = vectors[labels.masked_fill(left_out, 0)].to(output.dtype)
            targets[left_out] = output.detach()[left_out]
            losses.append(nn.functional.mse_loss(output, targets, reduction="sum"))
            elements += output[0].numel() * int((~left_out).sum())
        return torch.stack(losses).sum() / elements

    def shares(self, labels: Tensor, parts: Sequence[slice]) -> list[float]:
        """See `Objective.shares`: by what counts in each; 0 where nothing does.

        Raises:
            DataError: A sample is left out, and every one needs a class vector.
        """
        if self._takes_all:
            refuse_left_out(labels, self._num_classes)
        counts = [self.count(labels[part]) for part in parts]
        total = sum(counts)
        return [count / total if count else 0.0 for count in counts]

    def count(self, labels: Tensor) -> float:
        """See `Objective.count`: samples that are not left out."""
        return int((labels != self._ignored).sum())

    def memory(self, output_bytes: int) -> Affine:
        """Return the bytes of drawing the class vectors; and per sample of the targets, the difference and its gradient.

        A mean over positions hands on a gradient of the outputs' own size, too.
        """
        drawing = _DRAWING_FACTOR[self._distribution] * self._num_classes * self._bytes_per_class
        return Affine(drawing, 3 * self._bytes_per_class + (output_bytes if self._pools else 0))


def _pooled_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Return the shape of a sample's mean over positions: its channels, or features."""
    return spec.shape[-1:] if spec.map_shape is None else spec.map_shape[:1]


def _pool(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """Return the means over positions, (B, channels) or (B, features)."""
    if tensor.dim() <= 2:
        return tensor
    if spec.map_shape is None or spec.features == -1:
        return tensor.flatten(1, -2).mean(1)
    return tensor.flatten(2).mean(2)

"""Similarity matching: a layer learns which samples of a batch are alike, by their classes (Nøkland and Eidnes, arXiv 1901.06656).

    outputs --[pool to 8x8 - 3x3 convolution - deviation over positions]--> features (B, C) --[centre, norm]--> z
    loss = mean over pairs of samples of (z_i . z_j - y_i . y_j)^2, y: the samples' one-hot targets, centred and normed as features are

The matrices of cosines are those of the paper's section 3.1. Pooling larger maps to 8x8 first is ours, as for our heads of class scores:
their memory then does not grow with the map.
"""

import torch
from torch import Tensor, nn

from lowmem_pnn.methods.heads import AXES, ChannelsFirst, pooled_map
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.targets import PYTORCH_IGNORED

SIMILARITY_WEIGHT = 0.99
"""Share of similarity matching in the loss where a layer learns its classes too (section 3.3)."""
_SMALLEST_NORM = 1e-8


class SimilarityHead(nn.Module):
    """A head of class scores, with features beside them that similarity matching compares.

    Args:
        classifier: head of class scores, from (B, ...) to (B, classes).
        boundary: output tensor of the layer.
        scores_teach: whether the layer learns from the class scores too; else these learn alone, and are an exit like any other's.
    """

    def __init__(self, classifier: nn.Module, boundary: TensorSpec, *, scores_teach: bool) -> None:
        super().__init__()
        self.classifier = classifier
        self.features = _features(boundary)
        self._scores_teach = scores_teach

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return class scores; in train mode unit vectors (B, features) beside them."""
        if not self.training:
            return self.classifier(x)  # type: ignore[no-any-return]
        return self.classifier(x if self._scores_teach else x.detach()), unit_vectors(self.features(x))


def exit_head(head: nn.Module) -> nn.Module:
    """Return what gives the class scores of a head."""
    return head.classifier if isinstance(head, SimilarityHead) else head


def unit_vectors(rows: Tensor) -> Tensor:
    """Return rows (B, N) less their means, of length 1; what does not vary stays 0."""
    centred = rows - rows.mean(1, keepdim=True)
    lengths: Tensor = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    # A row that does not vary has no direction to be turned to: divided by next to nothing, its gradient would blow up the layer.
    return centred / lengths.masked_fill(lengths < _SMALLEST_NORM, 1.0)


def similarity_loss(vectors: Tensor, targets: Tensor, num_classes: int, ignored: int = PYTORCH_IGNORED) -> Tensor:
    """Return the mean squared difference of two matrices of cosines, over the samples that are not left out.

    Args:
        vectors: Unit vectors of the samples, (B, N).
        targets: Classes (B,), or their probabilities (B, classes).
        num_classes: Number of classes.
        ignored: Class number that is left out, as the task's own loss has it.
    """
    left_out = None if targets.is_floating_point() else targets == ignored
    if left_out is not None:
        targets = nn.functional.one_hot(targets.long().masked_fill(left_out, 0), num_classes).float()
    wanted, vectors = unit_vectors(targets.float()), vectors.float()
    cosines, wanted = vectors @ vectors.T, wanted @ wanted.T
    if left_out is None or not bool(left_out.any()):
        return nn.functional.mse_loss(cosines, wanted)
    # Pairs with a sample that is left out are compared with themselves.
    wanted[left_out] = cosines.detach()[left_out]
    wanted[:, left_out] = cosines.detach()[:, left_out]
    return nn.functional.mse_loss(cosines, wanted, reduction="sum") / int((~left_out).sum()) ** 2


class _Deviations(nn.Module):
    """Deviations over positions: (B, C, ...) to (B, C), or of tokens (B, T, D) to (B, D); of one position alone what it has.

    Args:
        axis: Axis of the features.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self._axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Return the deviations."""
        rows = x.movedim(self._axis, 1).flatten(2)
        return rows.std(2) if rows.shape[2] > 1 else rows[:, :, 0]


def _features(boundary: TensorSpec) -> nn.Module:
    shape = boundary.shape
    if (map_shape := boundary.map_shape) is None:
        linear = nn.Linear(shape[-1], shape[-1], bias=False)
        return linear if len(shape) == 1 else nn.Sequential(linear, _Deviations(-1))
    convolution = AXES[len(shape) - 1][0](map_shape[0], map_shape[0], 3, 1, 1, bias=False)
    turned = [ChannelsFirst()] if boundary.features == -1 else []
    return nn.Sequential(*turned, *pooled_map(map_shape), convolution, _Deviations(1))

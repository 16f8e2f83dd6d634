"""Mixing of batches: MixUp and CutMix as torchvision has them, each a function of (seed, epoch, batch), so that no state needs saving."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_pnn.errors import DataError
from lowmem_pnn.samples.augment import AugmentationKey
from lowmem_pnn.seeds import seed_of


@dataclass(frozen=True)
class BatchMixer:
    """Mixes each sample of a batch with the one before it, and their labels in the same share.

    The draws are those of torchvision's `MixUp` and `CutMix` after `torch.manual_seed(mixing_seed(...))`; where both are given, those of
    its `RandomChoice` of the two. The share of a batch is drawn from Beta(alpha, alpha).

    Args:
        seed: Seed of the run.
        num_classes: Number of classes; labels become a probability for each. Several labels of a sample keep their form, between 0 and 1.
        mixup: Alpha of MixUp (Zhang et al. 2018), in which samples are added; None to leave it out.
        cutmix: Alpha of CutMix (Yun et al. 2019), in which a box of an image is another image's; None to leave it out.
    """

    seed: int
    num_classes: int
    mixup: float | None = None
    cutmix: float | None = None

    def __call__(self, x: Tensor, labels: Tensor, key: AugmentationKey, batch: int) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            x: Samples (B, ...) of a floating type. Where CutMix is drawn, and they have no height and width, as inside of a model,
                they are added in the share that the box would have.
            labels: Class numbers (B,), probabilities (B, classes), or 0 and 1 for each of several labels (B, labels).
            key: Word and number that name an epoch.
            batch: Number of the batch in the epoch.

        Returns:
            Mixed samples (B, ...), and probabilities (B, classes), or shares of the labels (B, labels), float32, in fresh memory.

        Raises:
            DataError: A label is no class.

        Example:
            >>> x, labels = BatchMixer(seed=0, num_classes=2, mixup=1.0)(torch.eye(2), torch.tensor([0, 1]), ("epoch", 0), 0)
            >>> torch.equal(x, labels)
            True
        """
        generator = torch.Generator().manual_seed(mixing_seed(self.seed, key, batch))
        cuts = self.cutmix is not None
        if self.mixup is not None and self.cutmix is not None:
            cuts = bool(torch.multinomial(torch.tensor([0.5, 0.5]), 1, generator=generator))
        alpha = self.cutmix if cuts else self.mixup
        assert alpha is not None, "there is something to do"
        # What `torch.distributions.Beta` draws, which takes no generator.
        share = float(torch._sample_dirichlet(torch.tensor([[alpha, alpha]]), generator)[0, 0])
        if not cuts:
            return _added(x, share), _added(self._probabilities(labels), share)
        height, width = x.shape[-2:] if x.ndim == 4 else (1024, 1024)
        top, bottom, left, right = _box(share, height, width, generator)
        share = 1.0 - (right - left) * (bottom - top) / (width * height)
        if x.ndim == 4:
            mixed = x.clone()
            mixed[..., top:bottom, left:right] = x[..., top:bottom, left:right].roll(1, 0)
        else:
            mixed = _added(x, share)
        return mixed, _added(self._probabilities(labels), share)

    def _probabilities(self, labels: Tensor) -> Tensor:
        if labels.is_floating_point():
            return labels
        if bool(((labels < 0) | (labels >= self.num_classes)).any()):
            left_out = int(labels[(labels < 0) | (labels >= self.num_classes)][0])
            raise DataError(
                f"label {left_out} is none of the {self.num_classes} classes, and {self.option} mixes the labels of all samples; leave "
                f"the samples that have it out of the data, or leave {self.option} out"
            )
        return torch.nn.functional.one_hot(labels, self.num_classes).float()

    @property
    def option(self) -> str:
        """The option that asked for it."""
        return "--cutmix" if self.mixup is None else "--mixup"


def mixing_seed(seed: int, key: AugmentationKey, batch: int) -> int:
    """Return the seed of a batch's mixing: plain PyTorch sees the same after `torch.manual_seed` with it.

    Args:
        seed: Seed of the run.
        key: Word and number that name an epoch.
        batch: Number of the batch in the epoch.
    """
    return seed_of(seed, "mix", *key, batch)


def _added(x: Tensor, share: float) -> Tensor:
    """Return x * share + (x of the sample before) * (1 - share), one sample at a time: memory for one batch, not for two."""
    mixed = x.roll(1, 0).mul_(1.0 - share)
    for row, sample in zip(mixed, x, strict=True):
        row.add_(sample * share)
    return mixed


def _box(share: float, height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of a box around a random place, of 1 - share of the image where it lies inside of it."""
    column, row = (int(torch.randint(size, (1,), generator=generator)) for size in (width, height))
    radius = 0.5 * math.sqrt(1.0 - share)
    half_width, half_height = int(radius * width), int(radius * height)
    return (
        max(row - half_height, 0),
        min(row + half_height, height),
        max(column - half_width, 0),
        min(column + half_width, width),
    )

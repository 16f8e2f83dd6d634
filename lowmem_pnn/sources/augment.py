"""Augmentation: random crops and flips of images, each a function of (seed, key, sample), so that no state needs saving."""

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lowmem_pnn.seeds import seed_of

Augmentation = Literal["none", "basic"]

# He et al. 2016, section 4.2: 4 pixels of padding on 32x32 images, a random crop, a random horizontal flip.
_PADDING_SHARE = 8


class RandomCropFlip:
    """Random crops of padded images, and horizontal flips: the usual augmentation for CIFAR.

    Args:
        num_samples: Number of samples in the split.
        seed: Seed of the run.
        key: Word and number that name an epoch, or a view: each has crops of its own.

    Example:
        >>> augment = RandomCropFlip(num_samples=10, seed=0, key=("epoch", 0))
        >>> augment(torch.zeros(2, 3, 32, 32), np.array([7, 3])).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, num_samples: int, seed: int, key: tuple[str, int]) -> None:
        # Random words are all that is taken of numpy: they may not change from release to release.
        words = np.random.Philox(key=seed_of(seed, "augment", *key)).random_raw(num_samples)
        self._draws = (words[:, None] >> np.array([0, 20, 40], dtype=np.uint64)).astype(np.int64) & 0xFFFFF

    def __call__(self, images: Tensor, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Augment samples.

        Args:
            images: Images (B, C, H, W).
            numbers: Numbers of the samples in the split, (B,).

        Returns:
            Augmented images (B, C, H, W), in fresh memory.
        """
        height, width = images.shape[2:]
        rows, columns = height // _PADDING_SHARE, width // _PADDING_SHARE
        padded = nn.functional.pad(images, (columns, columns, rows, rows))
        out = torch.empty_like(images)
        for sample, (down, right, flip) in enumerate(self._draws[numbers].tolist()):
            top, left = down % (2 * rows + 1), right % (2 * columns + 1)
            crop = padded[sample, :, top : top + height, left : left + width]
            out[sample] = crop.flip(-1) if flip % 2 else crop
        return out

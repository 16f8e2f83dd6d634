"""Augmentation of training images: each a function of (seed, epoch, sample), so that no state needs saving.

Random crops and flips are drawn here; RandAugment and TrivialAugmentWide are torchvision's, each image with a generator of its own.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowmem_pnn.config.data_options import Augmentation
from lowmem_pnn.errors import DataError
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.sources.imports import import_torchvision

AugmentationKey = tuple[str, int]
"""Word and number that name an epoch, or a view: the random changes of images follow from them and the seed."""

# He et al. 2016, section 4.2: 4 pixels of padding on 32x32 images, a random crop, a random horizontal flip.
_PADDING_SHARE = 8
_POLICIES = {"randaugment": "RandAugment", "trivial": "TrivialAugmentWide"}
_RANDOM_FUNCTIONS = frozenset({torch.rand, torch.randint, torch.randn, torch.randperm})


class Augmenter:
    """Augments training images.

    Args:
        kind: `basic`, random crops and flips; `randaugment` or `trivial`, these, and then torchvision's policy of that name.
        num_samples: Number of samples in the split.
        seed: Seed of the run.
        where: Name of the data in messages.

    Example:
        >>> augment = Augmenter("basic", num_samples=10, seed=0)
        >>> augment(torch.zeros(2, 3, 32, 32), np.array([7, 3]), ("epoch", 0)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, kind: Augmentation, num_samples: int, seed: int, where: str = "the data set") -> None:
        assert kind != "none", "there is something to do"
        self._kind, self._num_samples, self._seed, self._where = kind, num_samples, seed, where
        self._policy: Callable[[Tensor], Tensor] | None = None
        if kind in _POLICIES:
            self._policy = getattr(import_torchvision("transforms.v2"), _POLICIES[kind])()
        self._crops: tuple[AugmentationKey, RandomCropFlip] | None = None

    def masks(self, masks: Tensor, numbers: npt.NDArray[np.int64], key: AugmentationKey, outside: int) -> Tensor:
        """Crop and flip the masks of images as the images are.

        Args:
            masks: Class numbers (B, H, W).
            numbers: As for `__call__`.
            key: As for `__call__`.
            outside: Class number of what was outside of an image.
        """
        assert self._policy is None, "torchvision's policies take no masks"
        return self._crops_of(key)(masks[:, None], numbers, outside)[:, 0]

    def __call__(self, images: Tensor, numbers: npt.NDArray[np.int64], key: AugmentationKey) -> Tensor:
        """Augment samples.

        Args:
            images: Images (B, C, H, W), from 0 to 1.
            numbers: Numbers of the samples in the split, (B,).
            key: Word and number that name an epoch, or a view.

        Returns:
            Augmented images (B, C, H, W), in fresh memory.

        Raises:
            DataError: An image has values that torchvision's policies do not take.
        """
        out = self._crops_of(key)(images, numbers)
        if self._policy is None:
            return out
        if float(out.min()) < 0 or float(out.max()) > 1:
            raise DataError(
                f"--augment {self._kind} is for images with values from 0 to 1, and those of {self._where} are from "
                f"{float(out.min()):g} to {float(out.max()):g}; bring them to that range, or give --augment basic"
            )
        for row, number in enumerate(numbers.tolist()):
            with _DrawsFrom(policy_seed(self._seed, self._kind, key, number)):
                out[row] = self._policy(out[row])
        return out

    def _crops_of(self, key: AugmentationKey) -> "RandomCropFlip":
        if self._crops is None or self._crops[0] != key:
            self._crops = key, RandomCropFlip(self._num_samples, self._seed, key)
        return self._crops[1]


def policy_seed(seed: int, kind: Augmentation, key: AugmentationKey, number: int) -> int:
    """Return the seed of one image's RandAugment or TrivialAugmentWide: plain PyTorch sees the same after `torch.manual_seed` with it.

    Args:
        seed: Seed of the run.
        kind: Kind of augmentation.
        key: Word and number that name an epoch, or a view.
        number: Number of the sample in the training part.
    """
    return seed_of(seed, "augment", kind, *key, number)


class _DrawsFrom(TorchFunctionMode):
    """Has random functions draw from a generator of their own: torch's global one is the training thread's at the same time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM_FUNCTIONS:
            kwargs = {"generator": self._generator, **kwargs}
        return func(*args, **kwargs)


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

    def __init__(self, num_samples: int, seed: int, key: AugmentationKey) -> None:
        # Random words are all that is taken of numpy: they may not change from release to release.
        words = np.random.Philox(key=seed_of(seed, "augment", *key)).random_raw(num_samples)
        self._draws = (words[:, None] >> np.array([0, 20, 40], dtype=np.uint64)).astype(np.int64) & 0xFFFFF

    def __call__(self, images: Tensor, numbers: npt.NDArray[np.int64], outside: int = 0) -> Tensor:
        """Augment samples.

        Args:
            images: Images (B, C, H, W).
            numbers: Numbers of the samples in the split, (B,).
            outside: Value of what is outside of an image.

        Returns:
            Augmented images (B, C, H, W), in fresh memory.
        """
        height, width = images.shape[2:]
        rows, columns = height // _PADDING_SHARE, width // _PADDING_SHARE
        padded = nn.functional.pad(images, (columns, columns, rows, rows), value=outside)
        out = torch.empty_like(images)
        for sample, (down, right, flip) in enumerate(self._draws[numbers].tolist()):
            top, left = down % (2 * rows + 1), right % (2 * columns + 1)
            crop = padded[sample, :, top : top + height, left : left + width]
            out[sample] = crop.flip(-1) if flip % 2 else crop
        return out

"""Normalisation of images: (value - mean) / deviation by channel, with given statistics or those of training images."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.config.data_options import IMAGENET, numbers_of
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.sources.image_stats import ImageStats
from lowmem_pnn.sources.imports import import_torchvision
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.sources.subsets import sample_of

# Training images whose statistics stand for all of them.
_SAMPLED_IMAGES = 1024
_BATCH = 16
_ROWS = 4096
_DIGITS = 4


@dataclass(frozen=True)
class Normalization:
    """Normalises samples, by channel.

    Args:
        mean: Mean of each channel, or one for all values.
        std: Standard deviation of each channel, or one for all values.
        origin: Where they are from, in words that follow them; empty where they were given.
        of_columns: Whether there is one of each for every column of a table; there may be hundreds.

    Example:
        >>> Normalization((0.5,), (0.25,), "")(torch.ones(1, 1, 1, 2))
        tensor([[[[2., 2.]]]])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str
    of_columns: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise samples, as torchvision does.

        Args:
            x: Samples (B, C, H, W), (B, F) with a mean for each of F values, or of any other shape where there is one
                mean; the caller's own, which are changed.
        """
        if x.ndim != 4:
            mean, std = (torch.tensor(values, dtype=x.dtype) for values in (self.mean, self.std))
            return x.sub_(mean).div_(std)
        normalize = import_torchvision("transforms.v2.functional").normalize
        return normalize(x, list(self.mean), list(self.std), inplace=True)  # type: ignore[no-any-return]

    @property
    def step(self) -> str:
        """The step in words."""
        if self.of_columns:
            return f"numbers standardised{self.origin}"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"normalised by mean {mean} and deviation {std}{self.origin}"


def find_normalization(option: str, train: Split, seed: int, known: ImageStats | None, name: str) -> Normalization | None:
    """Return the normalisation that an option asks for.

    Args:
        option: `none`, `imagenet`, `auto` or `MEAN/STD`.
        train: Training part, with samples from 0 to 1 for `auto`.
        seed: Seed of the run.
        known: Statistics of the images that pretrained weights were trained on, if there are such weights.
        name: Name of the data set, for messages.

    Raises:
        ConfigError: There are as many means as the samples have no channels.
        DataError: A sample is not usable.
    """
    if option == "none":
        return None
    sample = train.batch([0])[0]
    if isinstance(sample, tuple):
        raise ConfigError(f"--normalize {option}: samples of data {name} are several tensors; normalise them in the data set")
    shape = sample.shape[1:]
    channels = shape[0] if len(shape) == 3 else 1
    if option == "auto" and known is None:
        mean, std = _statistics(train, seed)
        count = min(len(train), _SAMPLED_IMAGES)
        return Normalization(mean, std, f", those of {count:,} training samples")
    if option == "auto":
        assert known is not None
        (mean, std), origin, source = (known.mean, known.std), ", those of the pretrained weights", "the pretrained weights have"
    elif option == "imagenet":
        (mean, std), origin, source = IMAGENET, ", those of ImageNet", "--normalize imagenet has"
    else:
        (mean, std), origin, source = numbers_of(option), "", f"--normalize {option} has"
    if len(mean) not in (1, channels):
        what = (
            f"{channels} channel{'s' if channels > 1 else ''}" if len(shape) == 3 else f"shape {tuple(shape)}, without channels"
        )
        raise ConfigError(
            f"{source} {len(mean)} means, and the samples of data {name} have {what}; give one mean and deviation"
            f"{f', or {channels}' if channels > 1 else ''}, or --normalize auto"
        )
    return Normalization(mean, std, origin)


def standardization(train: Split, numbers: list[int]) -> Normalization | None:
    """Return what brings each column of numbers to a mean of 0 and a deviation of 1 over the training part.

    Args:
        train: Training part, with samples (F,).
        numbers: Places of the columns of numbers; the others stay as they are.
    """
    if not numbers:
        return None
    blocks = [range(begin, min(begin + _ROWS, len(train))) for begin in range(0, len(train), _ROWS)]

    def sums(of: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        parts = [of(np.asarray(train.batch(block)[0], dtype=np.float64)).sum(axis=0) for block in blocks]
        return np.asarray(np.sum(parts, axis=0)) / len(train)

    mean = sums(lambda x: x)
    # From the mean: a sum of squares would lose all digits of what lies far from 0.
    std = np.sqrt(sums(lambda x: np.square(x - mean)))
    chosen = np.isin(np.arange(len(mean)), numbers)
    # As float32, which samples are. A column of one value is only shifted.
    mean, std = np.where(chosen, mean, 0).astype(np.float32), np.where(chosen & (std > 0), std, 1).astype(np.float32)
    return Normalization(
        tuple(mean.tolist()), tuple(std.tolist()), " by mean and deviation of the training part (preparation)", of_columns=True
    )


def _statistics(train: Split, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of each channel of some training samples, to four digits."""
    chosen = sample_of(train, _SAMPLED_IMAGES, seed_of(seed, "statistics"))
    sums: list[np.ndarray] = []
    for begin in range(0, len(chosen), _BATCH):
        raw = chosen.batch(range(begin, min(begin + _BATCH, len(chosen))))[0]
        assert isinstance(raw, Tensor), "samples are one tensor each"
        x = raw.to(torch.float64)
        by_channel = x.movedim(1, 0).reshape(x.shape[1], -1) if x.ndim == 4 else x.reshape(1, -1)
        values = by_channel.numpy()
        sums.append(np.array([values.sum(axis=1), np.square(values).sum(axis=1), np.full(len(values), values.shape[1])]))
    total, squares, count = np.sum(sums, axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    if not np.isfinite(std).all():
        raise DataError("--normalize auto: the values of training samples are too large to be averaged; give MEAN/STD")
    # Four digits, as papers have them, are the same whatever the order of a sum; a channel of one value is only shifted.
    rounded = [float(f"{value:.{_DIGITS}g}") for value in std]
    return tuple(float(f"{value:.{_DIGITS}g}") for value in mean), tuple(value or 1.0 for value in rounded)

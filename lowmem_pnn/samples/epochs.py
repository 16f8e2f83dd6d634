"""Epochs: which training samples come in an epoch, and in which order; a function of (seed, epoch), so that no state needs saving."""

import copy
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.seeds import host_seeded, permutation_of, seed_of
from lowmem_pnn.sources.draws import DrawKey
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.sources.splits import Indices, Split, read_samples
from lowmem_pnn.sources.subsets import SubsetSplit, WrappedSplit, as_floats, labels_of

# Bytes of a number in a list of Python, as samplers give theirs, and in the arrays that are made of it; and of a sample that may be drawn: its
# place, its weight, and what PyTorch sums weights in.
_DRAWN_BYTES, _DRAWN_FROM_BYTES = 64, 32


def training_order(num_samples: int, seed: int, phase: str, epoch: int, *, shuffle: bool) -> npt.NDArray[np.int64]:
    """Return the numbers of training samples in the order in which they come.

    Args:
        num_samples: How many there are.
        seed: Seed of the run.
        phase: Word that seeds the order of shuffled epochs.
        epoch: Number of the epoch, from 0.
        shuffle: Whether the order follows from the epoch, instead of being one permutation for all.
    """
    return permutation_of(num_samples, seed, phase, epoch) if shuffle else permutation_of(num_samples, seed, "own order")


class EpochSampler:
    """A sampler of the user's own, which says which samples come in an epoch: drawn with seeds of (seed of the run, epoch).

    Args:
        sampler: Iterable of indices, with a length, such as a `WeightedRandomSampler`. A generator of its own is left out, and `set_epoch`
            is called where there is such.
        num_samples: Number of samples that it draws from.
        where: Name of the data in messages.

    Raises:
        DataError: It has no length, or does not give indices of samples, as many in every epoch, and the same after the same seed.
    """

    def __init__(self, sampler: Any, num_samples: int, where: str) -> None:
        self._sampler = copy.copy(sampler)
        if isinstance(getattr(sampler, "generator", None), torch.Generator):
            self._sampler.generator = None
        self._num_samples, self._where, self.name = num_samples, where, type(sampler).__name__
        try:
            self.length = len(sampler)
        # Whatever a user's sampler raises is the user's to see, on one line, with the original as the cause.
        except Exception as error:
            raise DataError(f"{where}: the length of the {self.name} cannot be told: {one_line(error)}; give it one") from error
        first, again = (self.indices(0, "epoch", 0) for _ in range(2))
        if not np.array_equal(first, again):
            raise DataError(
                f"{where}: the {self.name} draws others after the same seed of torch, numpy and Python's random; have it draw from one of these"
            )
        self.fingerprint = hashlib.sha256(first.tobytes()).hexdigest()
        """Hash that changes when what is drawn does."""

    def check(self, num_samples: int) -> None:
        """Refuse training samples that are fewer than those that are drawn from.

        Args:
            num_samples: Number of training samples.

        Raises:
            ConfigError: Some are validated on, or left out.
        """
        if num_samples != self._num_samples:
            raise ConfigError(
                f"{self._where}: the {self.name} draws from {self._num_samples:,} samples, of which {num_samples:,} are left to train on; give "
                "data to validate and test on by itself, and leave out --val-fraction, --test-fraction, --train-limit and --skip-broken"
            )

    def indices(self, seed: int, phase: str, epoch: int) -> npt.NDArray[np.int64]:
        """Return the indices of an epoch, as the sampler gives them after the seeds of torch, numpy and Python were set.

        Args:
            seed: Seed of the run.
            phase: Word for the kind of epoch.
            epoch: Number of the epoch, from 0.

        Raises:
            DataError: They are no indices of samples, or not as many as the sampler's length.
        """
        try:
            with host_seeded(seed_of(seed, "sampler", phase, epoch)):
                if hasattr(self._sampler, "set_epoch"):
                    self._sampler.set_epoch(epoch)
                found = np.fromiter((int(index) for index in self._sampler), dtype=np.int64)
        # As above.
        except Exception as error:
            raise DataError(f"{self._where}: the {self.name} fails: {one_line(error)}; see to it") from error
        if len(found) != self.length or not self.length or found.min() < 0 or found.max() >= self._num_samples:
            spread = f" from {found.min()} to {found.max()}" if len(found) else ""
            raise DataError(
                f"{self._where}: the {self.name} gives {len(found):,} indices{spread}, and its length is {self.length:,}, of "
                f"{self._num_samples:,} samples; give as many as it says, from 0 to {self._num_samples - 1:,}"
            )
        return found


class EpochSplit(WrappedSplit):
    """Split of which an epoch has other samples than each of them once.

    Its length is that of an epoch; numbers of samples are those of all.

    Args:
        base: All samples.
        length: Number of samples of an epoch: those after them in its order are left out.
        sampler: Draws the samples of an epoch, by their indices in the data set; None for each of them once.
        places: Place of each of the data set's samples among all, where there is a sampler.
    """

    def __init__(
        self, base: Split, length: int, sampler: EpochSampler | None = None, places: npt.NDArray[np.int64] | None = None
    ) -> None:
        super().__init__(base)
        self._length, self.sampler, self._places = length, sampler, places

    def __len__(self) -> int:
        return self._length

    @property
    def left_out(self) -> int:
        """Number of samples at the end of an epoch that are left out."""
        return (len(self.base) if self.sampler is None else self.sampler.length) - self._length

    @property
    def drawing_bytes(self) -> int:
        """Bytes that a sampler takes while it draws the samples of an epoch, beside their order."""
        return 0 if self.sampler is None else _DRAWN_BYTES * self.sampler.length + _DRAWN_FROM_BYTES * len(self.base)

    def order(self, seed: int, phase: str, epoch: int, *, shuffle: bool) -> npt.NDArray[np.int64]:
        """Return the numbers of an epoch's samples, as `training_order` does."""
        if self.sampler is None:
            return training_order(len(self.base), seed, phase, epoch, shuffle=shuffle)[: self._length]
        assert self._places is not None, "indices have places"
        return self._places[self.sampler.indices(seed, phase, epoch)][: self._length]

    def batch(self, indices: Indices, key: DrawKey | None = None) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Return samples and targets, as `Split.batch` does; of an epoch of more samples than there are, the first ones come again."""
        return read_samples(self.base, np.asarray(indices, dtype=np.int64) % len(self.base), key)

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Return targets (B, ...) alone, of samples by their numbers."""
        return labels_of(self.base, numbers)

    def as_floats(self) -> "EpochSplit":
        """Return the same split with integer samples as float32."""
        return EpochSplit(as_floats(self.base), self._length, self.sampler, self._places)


def epochs_of(split: Any) -> EpochSplit | None:
    """Return what says which samples come in an epoch; None where each of them does, once.

    Args:
        split: Any split.
    """
    while not isinstance(split, EpochSplit) and (base := getattr(split, "base", None)) is not None:
        split = base
    return split if isinstance(split, EpochSplit) else None


def all_samples(split: Split) -> int:
    """Return of how many samples those of an epoch are.

    Args:
        split: Any split.
    """
    epochs = epochs_of(split)
    return len(split) if epochs is None else len(epochs.base)


def epoch_order(split: Split, seed: int, phase: str, epoch: int, *, shuffle: bool) -> npt.NDArray[np.int64]:
    """Return the numbers of an epoch's training samples in the order in which they come.

    Args:
        split: Training samples.
        seed: Seed of the run.
        phase: Word that seeds the order of shuffled epochs.
        epoch: Number of the epoch, from 0.
        shuffle: Whether the order follows from the epoch, instead of being one permutation for all.
    """
    if (epochs := epochs_of(split)) is not None:
        return epochs.order(seed, phase, epoch, shuffle=shuffle)
    return training_order(len(split), seed, phase, epoch, shuffle=shuffle)


def as_epochs(split: Split, batch_size: int | None, sampler: EpochSampler | None) -> Split:
    """Return training samples as they come in epochs.

    Args:
        split: All of them.
        batch_size: Samples of a batch, where an epoch has whole batches alone; None to leave nothing out.
        sampler: Draws the samples of an epoch; None for each of them once.

    Raises:
        DataError: An epoch has fewer samples than a batch.

    Example:
        >>> from lowmem_pnn.sources.map_split import from_torch
        >>> part = as_epochs(from_torch((np.zeros((10, 4)), np.arange(10))), 4, None)
        >>> len(part), all_samples(part), len(epoch_order(part, 0, "epoch", 0, shuffle=True))
        (8, 10, 8)
    """
    whole = left = len(split) if sampler is None else sampler.length
    if batch_size is not None:
        if whole < batch_size:
            raise DataError(
                f"--drop-last: {whole:,} training samples make no batch of {batch_size:,}; give --batch-size {whole} at most, or leave the "
                "option out"
            )
        left = whole // batch_size * batch_size
    if sampler is None:
        return split if left == whole else EpochSplit(split, left)
    return EpochSplit(split, left, sampler, _places(split))


def _places(split: Any) -> npt.NDArray[np.int64]:
    """Return the place of each of a data set's samples among those of a split that has all of them, in any order."""
    at: Any = split
    while not isinstance(at, SubsetSplit) and (base := getattr(at, "base", None)) is not None:
        at = base
    return np.argsort(at.numbers) if isinstance(at, SubsetSplit) else np.arange(len(split))

"""Subsets of data splits: chosen samples, the seeded division into parts, and parts whose classes are numbered otherwise."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.sources.draws import DrawKey
from lowmem_pnn.sources.splits import Indices, SampleSplit, Split, as_indices, read_samples


class SubsetSplit:
    """Split of some samples of another split, in a given order."""

    def __init__(self, base: Split, numbers: npt.NDArray[np.int64]) -> None:
        self.base, self.numbers = base, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, indices: Indices, key: DrawKey | None = None) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Return samples and classes, as `Split.batch` does; messages give the sample's number in the whole split."""
        return read_samples(self.base, self.numbers[as_indices(indices, len(self))], key)


class WrappedSplit:
    """Base class of splits that give another one's samples otherwise, as many of them.

    Args:
        base: The other split.
    """

    def __init__(self, base: Split) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    @property
    def readers(self) -> Any:
        """Processes that read the samples; None where this process does."""
        return getattr(self.base, "readers", None)


class RenumberedSplit(WrappedSplit):
    """Split whose classes get other numbers.

    Args:
        base: Split with a class number for each sample.
        numbers: New number of each class, (classes,).
    """

    def __init__(self, base: Split, numbers: Tensor) -> None:
        super().__init__(base)
        self.numbers = numbers

    def batch(self, indices: Indices, key: DrawKey | None = None) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Return samples and classes, as `Split.batch` does."""
        x, labels = read_samples(self.base, indices, key)
        return x, self._renumbered(labels)

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Return classes (B,) alone, of samples by their numbers."""
        return self._renumbered(labels_of(self.base, numbers))

    def _renumbered(self, labels: Tensor) -> Tensor:
        # What is left out (-100) is no class.
        count = len(self.numbers)
        return torch.where((labels >= 0) & (labels < count), self.numbers[labels.clamp(0, count - 1)], labels)


def subset(split: Split, indices: npt.NDArray[np.integer[Any]]) -> Split:
    """Take some samples of a split, in the order given.

    Args:
        split: Split to take the samples from.
        indices: Numbers of the samples, (M,) integers; M is at least 1.

    Raises:
        DataError: There are no indices.
        IndexError: An index is out of range.

    Example:
        >>> import torch
        >>> from lowmem_pnn.sources.map_split import from_torch
        >>> whole = from_torch((torch.zeros(6, 4), torch.arange(6)))
        >>> subset(whole, np.array([5, 3])).batch([0])[1]
        tensor([5])
    """
    if not len(indices):
        raise DataError(f"a subset of 0 of {len(split):,} samples cannot be trained on; choose at least 1")
    return SubsetSplit(split, as_indices(indices, len(split)).copy())


def sample_of(split: Split, limit: int | None, seed: int) -> Split:
    """Return some samples of a split, chosen by chance: the first ones may all be of one class.

    Args:
        split: Split to choose from.
        limit: Number of samples; None, or more than there are, for all of them.
        seed: Seed of the choice.

    Returns:
        The chosen samples, in the order of the split.

    Example:
        >>> from lowmem_pnn.sources.map_split import from_torch
        >>> sample_of(from_torch((np.zeros((10, 4)), np.arange(10))), 3, seed=0).batch([0, 1, 2])[1]
        tensor([2, 4, 8])
    """
    if limit is None or limit >= len(split):
        return split
    return subset(split, np.sort(_permutation(len(split), seed)[:limit]))


def whole_of(split: Split) -> Split:
    """Return the split that a subset is of; any other as it is.

    Args:
        split: Any split.
    """
    return whole_of(split.base) if isinstance(split, SubsetSplit | RenumberedSplit) else split


def reads_alone(split: Any) -> bool:
    """Decide whether nothing else of this process may draw at random while samples are read, since the data set does.

    Args:
        split: Any split; what other processes read does not matter here.
    """
    while getattr(split, "readers", None) is None and (base := getattr(split, "base", None)) is not None:
        split = base
    return isinstance(split, SampleSplit) and split.uses_generators


def labels_of(split: Split, numbers: npt.NDArray[np.int64]) -> Tensor:
    """Return the targets of samples, without reading the samples where that is possible.

    Args:
        split: Any split.
        numbers: Numbers of B samples.

    Returns:
        Targets (B, ...), as they are kept.
    """
    if isinstance(split, SubsetSplit):
        return labels_of(split.base, split.numbers[numbers])
    own: Callable[[npt.NDArray[np.int64]], Tensor] | None = getattr(split, "labels", None)
    return own(numbers) if own is not None else split.batch(numbers)[1]


def files_of(split: Split, numbers: npt.NDArray[np.int64]) -> list[Path] | None:
    """Return the files of samples; None where they have none.

    Args:
        split: Any split.
        numbers: Numbers of B samples.
    """
    if isinstance(split, SubsetSplit):
        return files_of(split.base, split.numbers[numbers])
    if isinstance(split, RenumberedSplit):
        return files_of(split.base, numbers)
    return split.files(numbers) if isinstance(split, SampleSplit) else None


def places_of(split: Split) -> npt.NDArray[np.int64]:
    """Return the place of each sample in its source, from 0, which broken samples that were left out have too; its number in a subset.

    Args:
        split: Any split.
    """
    if isinstance(split, RenumberedSplit):
        return places_of(split.base)
    return split.places if isinstance(split, SampleSplit) else np.arange(len(split))


def as_floats(split: Split) -> Split:
    """Return a split with its integer samples as float32: numbers to calculate with, and no tokens.

    Args:
        split: Split of the package's own, or a subset of one.
    """
    if isinstance(split, SubsetSplit):
        return SubsetSplit(as_floats(split.base), split.numbers)
    if isinstance(split, RenumberedSplit):
        return RenumberedSplit(as_floats(split.base), split.numbers)
    if hasattr(split, "as_floats"):
        floating: Split = split.as_floats()
        return floating
    assert isinstance(split, SampleSplit), "a split of a user's own gives samples as they are"
    floats = copy.copy(split)
    floats.preprocessing = split.preprocessing.as_floats()
    return floats


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Divide a split into a part that stays and a part that is held out, by a seeded permutation; both in the split's order.

    Args:
        split: Split to divide.
        fraction: Share that is held out, 0 < fraction < 1; rounded to samples, at least one.
        seed: Seed of the permutation.

    Raises:
        DataError: No sample would be left.

    Example:
        >>> import torch
        >>> from lowmem_pnn.sources.map_split import from_torch
        >>> whole = from_torch((torch.zeros(10, 4), torch.arange(10)))
        >>> [len(part) for part in hold_out(whole, 0.2, seed=0)]
        [8, 2]
    """
    count = max(round(len(split) * fraction), 1)
    if count >= len(split):
        raise DataError(
            f"a test fraction of {fraction:g} of {len(split)} samples leaves none to train on; use more samples, or a smaller --test-fraction"
        )
    order = _permutation(len(split), seed)
    return subset(split, np.sort(order[count:])), subset(split, np.sort(order[:count]))


def _permutation(length: int, seed: int) -> npt.NDArray[np.int64]:
    # RandomState's stream is frozen for good, a Generator's is not: the same seed must give the same parts in years to come.
    return np.random.RandomState(seed % 2**32).permutation(length).astype(np.int64)


def train_val_split(split: Split, val_fraction: float, seed: int, limit: int | None) -> tuple[Split, Split | None]:
    """Divide a split into a part to train on and a part to validate on, by a seeded permutation.

    Both come in the permutation's order: samples that are stored by class would otherwise make shards of one class each.

    Args:
        split: Split to divide.
        val_fraction: Share to validate on, 0 <= val_fraction < 1; rounded to samples, at least one if positive.
        seed: Seed of the permutation.
        limit: Number of samples to use, the first of the permutation; None, or more than there are, for all.

    Returns:
        The training part and the validation part; they are disjoint and cover the samples that `limit` leaves. The second is None
        if `val_fraction` is 0.

    Raises:
        ConfigError: A fraction, a seed or a limit is out of range.
        DataError: No sample would be left to train on.

    Example:
        >>> import torch
        >>> from lowmem_pnn.sources.map_split import from_torch
        >>> whole = from_torch((torch.zeros(10, 4), torch.arange(10)))
        >>> [len(part) for part in train_val_split(whole, 0.2, seed=0, limit=None)]
        [8, 2]
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"a validation fraction of {val_fraction} is not in 0 <= fraction < 1; give, for example, 0.1")
    if seed < 0:
        raise ConfigError(f"a seed of {seed} is negative; give 0 or more")
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} samples leaves none; give at least 1")
    chosen = _permutation(len(split), seed)[:limit]
    num_val = max(round(len(chosen) * val_fraction), 1) if val_fraction else 0
    if num_val >= len(chosen):
        raise DataError(
            f"a validation fraction of {val_fraction} of {len(chosen)} samples leaves none to train on; "
            "use more samples or fraction 0 (--train-limit, --val-fraction)"
        )
    train = SubsetSplit(split, chosen[: len(chosen) - num_val])
    return train, SubsetSplit(split, chosen[len(chosen) - num_val :]) if num_val else None

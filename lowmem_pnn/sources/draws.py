"""Draws: what a data set draws at random while a sample is read, made a function of a key and of the sample's number.

    with host_seeded(seed_of(*key, number)):
        sample = dataset[number]

The key of a training sample is (seed of the run, "sample", "epoch", epoch), that of any other is ("sample",): so a sample is the same
whenever it is read again.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowmem_pnn.seeds import host_seeded, random_generators, seed_of
from lowmem_pnn.sources.arrays import as_tensor

DrawKey: TypeAlias = tuple[int | str, ...]
"""Numbers and words that the seed of a reading is made of, with the sample's number behind them."""

FIXED: DrawKey = ("sample",)
"""Key of samples that are the same whenever they are read: of validation, of the test, and of looks at training samples."""

# Number of samples that stand for all samples of a data set.
_NUM_PROBES = 16


def probes_of(length: int) -> list[int]:
    """Return the places of a few evenly spaced samples.

    Args:
        length: Number of samples.
    """
    return [int(number) for number in np.unique(np.linspace(0, length - 1, _NUM_PROBES).astype(np.int64))]


class SampleReader:
    """Reads samples of a data set, each with a seed of its own where the data set draws at random.

    Args:
        dataset: Data set with `__getitem__`.
        length: Number of its samples.
    """

    def __init__(self, dataset: Any, length: int) -> None:
        self._dataset, self._notices = dataset, False
        self.is_random = False
        """Whether a sample follows from the global random generators."""
        self.uses_generators = False
        """Whether reading a sample changes the global random generators, be it that the data set seeds them itself."""
        # A collation has read all samples, and knows some that draw.
        for number in dict.fromkeys([*probes_of(length), *getattr(dataset, "numbers_that_draw", ())]):
            self._look_at(number)

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Look, in a context in which samples are read anyway, whether some draw that stand alone, as where one rare class is augmented."""
        self._notices = True
        try:
            yield
        finally:
            self._notices = False

    def read(self, number: int, key: DrawKey | None = None) -> Any:
        """Return what the data set gives at a number; the global random generators are as before afterwards.

        Args:
            number: Number of the sample.
            key: What is drawn follows from this and the number; None for `FIXED`.
        """
        if not self.uses_generators and not self._notices:
            return self._dataset[number]
        with host_seeded(seed_of(*(FIXED if key is None else key), number)):
            if self.uses_generators:
                return self._dataset[number]
            before = random_generators()
            try:
                return self._dataset[number]
            finally:
                if random_generators() != before:
                    self._look_at(number)

    def _look_at(self, number: int) -> None:
        """Find out whether a sample follows from the global generators, and whether reading it changes them.

        What is drawn need not show in every sample: half of all flips leave an image as it is. So the generators are looked at.
        """
        one, other = self._observed(number, 0), self._observed(number, 1)
        # Of the first reading of all something may be drawn once, as by what is imported then.
        follows = any(change and own != others for change, own, others in zip(other.changes, one.after, other.after, strict=True))
        # A data set may put generators back, or seed them by itself once it has drawn; one with a generator of its own has no such rule.
        follows = follows or (not one.same_as(other) and one.same_as(self._observed(number, 0)))
        self.is_random |= follows
        self.uses_generators |= follows or any(other.changes)

    def _observed(self, number: int, seed: int) -> "_Observed":
        with host_seeded(seed):
            before = random_generators()
            item = None
            # What cannot be read is said where it is wanted.
            with suppress(Exception):
                item = self._dataset[number]
            after = random_generators()
            leaves = [_tensor(leaf) for leaf in pytree.tree_leaves(item)]
        return _Observed(before, after, leaves)


class _Observed:
    """A reading of a sample: the generators before and after it, and its tensors."""

    def __init__(self, before: tuple[Any, ...], after: tuple[Any, ...], leaves: list[Tensor | None]) -> None:
        self.after, self.leaves = after, leaves
        self.changes = [one != other for one, other in zip(before, after, strict=True)]

    def same_as(self, other: "_Observed") -> bool:
        """Decide whether another reading gave the same."""
        return len(self.leaves) == len(other.leaves) and all(
            one is mine or (one is not None and mine is not None and same_values(one, mine))
            for one, mine in zip(self.leaves, other.leaves, strict=True)
        )


def same_values(one: Tensor, other: Tensor) -> bool:
    """Decide whether two tensors have one form and the same values, of which NaN is one.

    Args:
        one: Any tensor.
        other: Any other.
    """
    return (one.shape, one.dtype) == (other.shape, other.dtype) and bool(torch.isclose(one, other, 0, 0, equal_nan=True).all())


def _tensor(leaf: Any) -> Tensor | None:
    """Return a part of a sample as a tensor; None of one that is none, such as a word."""
    with suppress(Exception):
        return as_tensor(leaf, "a sample", palette=True)
    return None

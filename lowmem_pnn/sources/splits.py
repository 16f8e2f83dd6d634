"""Parts of data sets as indexed samples: from arrays, from any map-style data set, and seeded pieces of them."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.errors import ConfigError, DataError, LowMemError
from lowmem_pnn.sources.arrays import as_label, as_labels, as_tensor, hash_tensor
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.sources.presentation import Presentation, Wants

Indices: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]]"

# How many samples of a data set that is not an array stand for all of it in its fingerprint.
_NUM_PROBES = 16
# How much of an array is looked at together.
_CHECKED_BYTES = 4 << 20


class Split(Protocol):
    """One part of a data set: a fixed sample at every index."""

    def __len__(self) -> int:
        """The number of samples, at least 1."""
        ...

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Samples as the model sees them, and their classes.

        Args:
            indices: B of them, from 0 to below the length, in any order, also repeated.

        Returns:
            (B, ...) float32 (int64 for tokens) and (B,) int64, contiguous and the caller's own.

        Raises:
            DataError: a sample with NaN or infinity, or with a label that is no class; the message names it.
            IndexError: an index out of range.
        """
        ...


class SampleSplit:
    """What our own splits have in common: they check, present, and know what they hold."""

    presentation: Presentation
    num_classes: int
    where: str

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """See `Split.batch`."""
        numbers = _as_indices(indices, len(self))
        raw, labels = self._raw(numbers)
        x = self.presentation(raw)
        # Bytes are always finite; looking would be a pass over the batch for nothing.
        if self.presentation.raw_dtype.is_floating_point and not bool(torch.isfinite(x).all()):
            finite = torch.isfinite(x).reshape(len(x), -1).all(dim=1)
            worst = int((~finite).nonzero()[0])
            value = "NaN" if bool(x[worst].isnan().any()) else "an infinite value"
            raise DataError(f"sample {self._name(numbers[worst])} of {self.where} holds {value}; repair it or leave it out")
        wrong = (labels < 0) | (labels >= self.num_classes)
        if bool(wrong.any()):
            worst = int(wrong.nonzero()[0])
            raise DataError(
                f"sample {self._name(numbers[worst])} of {self.where} has label {int(labels[worst])}, outside 0 to "
                f"{self.num_classes - 1} ({self.num_classes} classes); number the classes from 0"
            )
        return x, labels

    def fingerprint(self) -> str:
        """A hash that changes when the samples or labels do."""
        raise NotImplementedError

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Fresh (B, *raw_shape) tensor and (B,) int64 labels."""
        raise NotImplementedError

    def _name(self, number: np.int64) -> str:
        """What to call a sample in a message."""
        return str(number)


class ArraySplit(SampleSplit):
    """Samples that are held in memory as one tensor.

    Args:
        x: (N, ...) of any real dtype, neither copied nor changed.
        y: (N,) int64.
        num_classes: labels are below it.
        wants: what the model takes.
        where: what to call it in messages.
    """

    def __init__(self, x: Tensor, y: Tensor, num_classes: int, wants: Wants, where: str) -> None:
        _require_samples(len(x), where)
        if len(x) != len(y):
            raise DataError(f"{where}: {len(x):,} samples but {len(y):,} labels; give one label for each sample")
        super().__init__(len(x))
        self.num_classes, self.where = num_classes, where
        self.presentation = Presentation.of(tuple(x.shape[1:]), x.dtype, wants, where)
        self._x, self._y = x, y

    def check(self) -> None:
        """Look at every sample: better now than when the last of them is first read, after the training.

        Raises:
            DataError: as `batch`.
        """
        if self.presentation.raw_dtype.is_floating_point:
            step = max(1, _CHECKED_BYTES // max(1, self._x[0].nbytes))
            for begin in range(0, len(self), step):
                self.batch(np.arange(begin, min(begin + step, len(self))))

    def fingerprint(self) -> str:
        """A hash of the values; of very large arrays, of evenly spaced pieces and a sum."""
        digest = hashlib.sha256()
        hash_tensor(digest, self._x)
        hash_tensor(digest, self._y)
        return digest.hexdigest()

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(numbers)
        return self._x.index_select(0, index), self._y.index_select(0, index)


class MapSplit(SampleSplit):
    """Samples of a map-style data set, (x, class number) at each index, read when asked for.

    Args:
        dataset: has `__len__` and `__getitem__`; x is a tensor, an array, a number or a PIL image; without random transforms.
        num_classes: labels are below it.
        wants: what the model takes.
        where: what to call it in messages.
    """

    def __init__(self, dataset: Any, num_classes: int, wants: Wants, where: str) -> None:
        _require_samples(len(dataset), where)
        super().__init__(len(dataset))
        self.num_classes, self.where = num_classes, where
        self._dataset = dataset
        first, _ = self._sample(0)
        self.presentation = Presentation.of(tuple(first.shape), first.dtype, wants, where)

    def fingerprint(self) -> str:
        """A hash of the length and of a few evenly spaced samples.

        Raises:
            DataError: a sample is another one when it is read again.
        """
        digest = hashlib.sha256(str(len(self)).encode())
        for number in np.unique(np.linspace(0, len(self) - 1, _NUM_PROBES).astype(np.int64)):
            x, label = self._sample(int(number))
            again, label_again = self._sample(int(number))
            if label != label_again or x.shape != again.shape or not bool(torch.isclose(x, again, 0, 0, equal_nan=True).all()):
                raise DataError(
                    f"sample {number} of {self.where} differs when it is read again; take random transforms out of the data set, "
                    "since what partitions compute from a sample is kept"
                )
            hash_tensor(digest, x)
            digest.update(str(label).encode())
        return digest.hexdigest()

    def _sample(self, number: int) -> tuple[Tensor, int]:
        try:
            item = self._dataset[number]
        except (LowMemError, MemoryError):
            raise
        # Whatever a user's data set raises is the user's to see, on one line, with the original as the cause.
        except Exception as error:
            raise DataError(
                f"sample {number} of {self.where} cannot be read: {one_line(error)}; repair it or leave it out"
            ) from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            found = f"{len(item)} values" if isinstance(item, tuple | list) else f"a {type(item).__name__}"
            raise DataError(f"sample {number} of {self.where} is {found}; a data set must give pairs (x, class number)")
        place = f"sample {number} of {self.where}"
        return as_tensor(item[0], place), as_label(item[1], place)

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        expected = self.presentation
        xs: list[Tensor] = []
        labels: list[int] = []
        for number in numbers:
            x, label = self._sample(int(number))
            if tuple(x.shape) != expected.raw_shape or x.dtype != expected.raw_dtype:
                raise DataError(
                    f"sample {self._name(number)} of {self.where} is {tuple(x.shape)} {x.dtype}, sample 0 is "
                    f"{expected.raw_shape} {expected.raw_dtype}; give all samples one shape and dtype"
                )
            xs.append(x)
            labels.append(label)
        return torch.stack(xs), torch.tensor(labels, dtype=torch.int64)


class SubsetSplit:
    """Some samples of a split, in a given order."""

    def __init__(self, base: Split, numbers: npt.NDArray[np.int64]) -> None:
        self._base, self._numbers = base, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """See `Split.batch`; messages give the number in the whole split."""
        return self._base.batch(self._numbers[_as_indices(indices, len(self))])


def from_torch(dataset: Any, *, num_classes: int | None = None, wants: Wants = "any", where: str = "the data set") -> SampleSplit:
    """Make a split of a PyTorch data set or of tensors.

    Args:
        dataset: a map-style data set of (x, class number), or a pair of tensors or arrays (x, y).
        num_classes: None: from the data set's `classes` or labels; without those every sample is read once to see.
        wants: what the model takes.
        where: what to call it in messages.

    Raises:
        DataError: it is empty, is not indexed, or does not hold such pairs.

    Example:
        >>> split = from_torch((torch.zeros(6, 28, 28, dtype=torch.uint8), torch.arange(6)), wants="flat")
        >>> x, y = split.batch([4, 1])
        >>> x.shape, y
        (torch.Size([2, 784]), tensor([4, 1]))
    """
    if isinstance(dataset, SampleSplit):
        return dataset
    if isinstance(dataset, tuple | list) and len(dataset) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in dataset):
        x, y = as_tensor(dataset[0], where), as_labels(dataset[1], where)
        if x.ndim < 1 or y.ndim != 1:
            raise DataError(f"{where}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; give x (N, ...) and y (N,)")
        _require_samples(len(y), where)
        return ArraySplit(x, y, max(int(y.max()) + 1, 1) if num_classes is None else num_classes, wants, where)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            f"{where} is a {type(dataset).__name__} without __getitem__ and __len__; give a map-style data set, so that every "
            "index has a fixed sample, or tensors (x, y)"
        )
    _require_samples(len(dataset), where)
    return MapSplit(dataset, _count_classes(dataset, where) if num_classes is None else num_classes, wants, where)


def subset(split: Split, indices: npt.NDArray[np.integer[Any]]) -> Split:
    """Take some samples of a split, in the order given.

    Args:
        split: the whole.
        indices: (M,) integers; M is at least 1.

    Raises:
        DataError: no indices.
        IndexError: an index out of range.

    Example:
        >>> whole = from_torch((torch.zeros(6, 4), torch.arange(6)))
        >>> subset(whole, np.array([5, 3])).batch([0])[1]
        tensor([5])
    """
    if not len(indices):
        raise DataError(f"a subset of 0 of {len(split):,} samples cannot be trained on; choose at least 1")
    return SubsetSplit(split, _as_indices(indices, len(split)).copy())


def train_val(split: Split, val_fraction: float, seed: int, limit: int | None) -> tuple[Split, Split | None]:
    """Divide a split into a part to train on and a part to validate on, by a seeded permutation.

    Both come in the permutation's order: samples that are stored by class would otherwise make shards of one class each.

    Args:
        split: the whole.
        val_fraction: the share to validate on, 0 <= val_fraction < 1; rounded to samples, at least one if positive.
        seed: of the permutation.
        limit: use only this many samples, the first of the permutation; None or more than there are: all.

    Returns:
        The training part and the validation part; they are disjoint and cover what `limit` leaves. The second is None if
        `val_fraction` is 0.

    Raises:
        ConfigError: a fraction or a limit out of range.
        DataError: nothing would be left to train on.

    Example:
        >>> whole = from_torch((torch.zeros(10, 4), torch.arange(10)))
        >>> [len(part) for part in train_val(whole, 0.2, seed=0, limit=None)]
        [8, 2]
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"a validation fraction of {val_fraction} is not in 0 <= fraction < 1; give, for example, 0.1")
    if seed < 0:
        raise ConfigError(f"a seed of {seed} is negative; give 0 or more")
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} samples leaves none; give at least 1")
    # RandomState's stream is frozen for good, a Generator's is not: the same seed must divide alike in years to come.
    chosen = np.random.RandomState(seed % 2**32).permutation(len(split)).astype(np.int64)[:limit]
    num_val = max(round(len(chosen) * val_fraction), 1) if val_fraction else 0
    if num_val >= len(chosen):
        raise DataError(
            f"a validation fraction of {val_fraction} of {len(chosen)} samples leaves none to train on; "
            "use more samples or fraction 0 (--train-limit, --val-fraction)"
        )
    train = SubsetSplit(split, chosen[: len(chosen) - num_val])
    return train, SubsetSplit(split, chosen[len(chosen) - num_val :]) if num_val else None


def _require_samples(num_samples: int, where: str) -> None:
    if not num_samples:
        raise DataError(f"{where} is empty: it holds 0 samples; give at least 1")


def _as_indices(indices: Indices, length: int) -> npt.NDArray[np.int64]:
    """Check indices before anything is read: a negative one would silently be counted from the end."""
    numbers = np.asarray(indices)
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
        raise IndexError(f"indices of shape {numbers.shape} and dtype {numbers.dtype}; give one axis of at least one integer")
    if numbers.min() < 0 or numbers.max() >= length:
        raise IndexError(f"indices from {numbers.min()} to {numbers.max()} for {length:,} samples; give 0 to {length - 1:,}")
    return numbers.astype(np.int64)


def _count_classes(dataset: Any, where: str) -> int:
    """The number of classes of a map-style data set, without reading the samples where it can be had otherwise."""
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, list | tuple) and classes:
        return len(classes)
    labels = getattr(dataset, "targets", None)
    if labels is None:
        tensors = getattr(dataset, "tensors", None)
        labels = tensors[-1] if isinstance(tensors, tuple) else None
    if labels is None and isinstance(dataset, torch.utils.data.Subset):
        return _count_classes(dataset.dataset, where)
    if labels is None:
        labels = [as_label(dataset[number][1], f"sample {number} of {where}") for number in range(len(dataset))]
    return max(int(as_labels(labels, where).max()) + 1, 1)

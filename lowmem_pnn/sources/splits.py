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
from lowmem_pnn.sources.preprocessing import Presentation, Wants, holds_tokens

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
            (B, ...) float32 (int64 for tokens) and (B, *label_shape) int64, contiguous and the caller's own. The label shape is
            (), or that of a sample where each token has a label.

        Raises:
            DataError: a sample with NaN or infinity, or with a label or a labelled token that is no class; the message names it.
            IndexError: an index out of range.
        """
        ...


class SampleSplit:
    """What our own splits have in common: they check, present, and know what they hold."""

    presentation: Presentation
    num_classes: int
    where: str
    label_shape: tuple[int, ...] = ()

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """See `Split.batch`."""
        numbers = as_indices(indices, len(self))
        raw, labels = self._raw(numbers)
        x = self.presentation(raw)
        # Bytes are always finite; looking would be a pass over the batch for nothing.
        if self.presentation.raw_dtype.is_floating_point and not bool(torch.isfinite(x).all()):
            finite = torch.isfinite(x).reshape(len(x), -1).all(dim=1)
            worst = int((~finite).nonzero()[0])
            value = "NaN" if bool(x[worst].isnan().any()) else "an infinite value"
            raise DataError(f"sample {self._name(numbers[worst])} of {self.where} holds {value}; repair it or leave it out")
        self._check_classes(labels, "label", numbers)
        if self.label_shape:
            # What comes next is a token too: both are numbered alike.
            self._check_classes(x, "token", numbers)
        return x, labels

    def _check_classes(self, values: Tensor, what: str, numbers: npt.NDArray[np.int64]) -> None:
        """Refuse (B, ...) numbers that are no class."""
        wrong = (values < 0) | (values >= self.num_classes)
        if bool(wrong.any()):
            worst = int(wrong.nonzero()[0, 0])
            raise DataError(
                f"sample {self._name(numbers[worst])} of {self.where} has {what} {int(values[wrong][0])}, outside 0 to "
                f"{self.num_classes - 1} ({self.num_classes} classes); number the classes from 0"
            )

    def fingerprint(self) -> str:
        """A hash that changes when the samples or labels do."""
        raise NotImplementedError

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Fresh (B, *raw_shape) tensor and (B, *label_shape) int64 labels."""
        raise NotImplementedError

    def _name(self, number: np.int64) -> str:
        """What to call a sample in a message."""
        return str(number)


class ArraySplit(SampleSplit):
    """Samples that are held in memory as one tensor.

    Args:
        x: (N, ...) of any real dtype, neither copied nor changed.
        y: (N,) or, with a label for each token, of x's shape; int64.
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
        self.label_shape = tuple(y.shape[1:])
        self.presentation = Presentation.of(tuple(x.shape[1:]), x.dtype, wants, where)
        self._x, self._y = x, y

    def check(self) -> None:
        """Look at every sample: better now than when the last of them is first read, after the training.

        Raises:
            DataError: as `batch`.
        """
        if self.presentation.raw_dtype.is_floating_point or self.label_shape:
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
    """Samples of a map-style data set, (x, class number) or tokens (x, y) at each index, read when asked for.

    Args:
        dataset: has `__len__` and `__getitem__`; x is a tensor, an array, a number or a PIL image; without random transforms.
        num_classes: labels are below it; None: counted, see `from_torch`.
        wants: what the model takes.
        where: what to call it in messages.
    """

    def __init__(self, dataset: Any, num_classes: int | None, wants: Wants, where: str) -> None:
        _require_samples(len(dataset), where)
        super().__init__(len(dataset))
        self.where = where
        self._dataset, self._wants = dataset, wants
        first, label = self._sample(0)
        self.label_shape = tuple(label.shape)
        self.presentation = Presentation.of(tuple(first.shape), first.dtype, wants, where)
        self.num_classes = self._count_classes() if num_classes is None else num_classes

    def fingerprint(self) -> str:
        """A hash of the length and of a few evenly spaced samples.

        Raises:
            DataError: a sample is another one when it is read again.
        """
        digest = hashlib.sha256(str(len(self)).encode())
        for number in np.unique(np.linspace(0, len(self) - 1, _NUM_PROBES).astype(np.int64)):
            x, label = self._sample(int(number))
            again, label_again = self._sample(int(number))
            same = torch.equal(label, label_again) and x.shape == again.shape
            if not same or not bool(torch.isclose(x, again, 0, 0, equal_nan=True).all()):
                raise DataError(
                    f"sample {number} of {self.where} differs when it is read again; take random transforms out of the data set, "
                    "since what partitions compute from a sample is kept"
                )
            hash_tensor(digest, x)
            digest.update(str(label.tolist()).encode())
        return digest.hexdigest()

    def _count_classes(self) -> int:
        """The number of classes; where there is a label for each token, one more than the largest of both."""
        known = _known_classes(self._dataset, self.where, self.label_shape != ())
        if known is not None:
            return known
        return max(count_classes(x[None], label[None]) for x, label in map(self._sample, range(len(self))))

    def _sample(self, number: int) -> tuple[Tensor, Tensor]:
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
        x = as_tensor(item[0], place)
        return x, as_label(item[1], place, tuple(x.shape) if holds_tokens(x.dtype, self._wants) else None)

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        expected = self.presentation
        xs: list[Tensor] = []
        labels: list[Tensor] = []
        for number in numbers:
            x, label = self._sample(int(number))
            if tuple(x.shape) != expected.raw_shape or x.dtype != expected.raw_dtype:
                raise DataError(
                    f"sample {self._name(number)} of {self.where} is {tuple(x.shape)} {x.dtype}, sample 0 is "
                    f"{expected.raw_shape} {expected.raw_dtype}; give all samples one shape and dtype"
                )
            if tuple(label.shape) != self.label_shape:
                raise DataError(
                    f"sample {self._name(number)} of {self.where} has labels of shape {tuple(label.shape)}, sample 0 of "
                    f"{self.label_shape}; give all samples labels of one shape"
                )
            xs.append(x)
            labels.append(label)
        return torch.stack(xs), torch.stack(labels)


class SubsetSplit:
    """Some samples of a split, in a given order."""

    def __init__(self, base: Split, numbers: npt.NDArray[np.int64]) -> None:
        self._base, self._numbers = base, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """See `Split.batch`; messages give the number in the whole split."""
        return self._base.batch(self._numbers[as_indices(indices, len(self))])


def from_torch(dataset: Any, *, num_classes: int | None = None, wants: Wants = "any", where: str = "the data set") -> SampleSplit:
    """Make a split of a PyTorch data set or of tensors.

    Args:
        dataset: a map-style data set of (x, class number), or a pair of tensors or arrays (x, y). Tokens, which are integers of
            a shape (N, T), may have a label each: y of the same shape.
        num_classes: None: from the data set's `classes` or labels; without those every sample is read once to see. Where tokens
            have labels, one more than the largest of either.
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
        x = as_tensor(dataset[0], where)
        y = as_labels(dataset[1], where, tuple(x.shape) if holds_tokens(x.dtype, wants) else None)
        if x.ndim < 1 or y.ndim < 1:
            raise DataError(f"{where}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; give x (N, ...) and y (N,)")
        _require_samples(len(y), where)
        return ArraySplit(x, y, count_classes(x, y) if num_classes is None else num_classes, wants, where)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            f"{where} is a {type(dataset).__name__} without __getitem__ and __len__; give a map-style data set, so that every "
            "index has a fixed sample, or tensors (x, y)"
        )
    _require_samples(len(dataset), where)
    return MapSplit(dataset, num_classes, wants, where)


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
    return SubsetSplit(split, as_indices(indices, len(split)).copy())


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


def as_indices(indices: Indices, length: int) -> npt.NDArray[np.int64]:
    """Check indices before anything is read: a negative one would silently be counted from the end.

    Args:
        indices: as `Split.batch` takes them.
        length: of the split.

    Raises:
        IndexError: there are none, they are no integers, or one is out of range.
    """
    numbers = np.asarray(indices)
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
        raise IndexError(f"indices of shape {numbers.shape} and dtype {numbers.dtype}; give one axis of at least one integer")
    if numbers.min() < 0 or numbers.max() >= length:
        raise IndexError(f"indices from {numbers.min()} to {numbers.max()} for {length:,} samples; give 0 to {length - 1:,}")
    return numbers.astype(np.int64)


def count_classes(x: Tensor, y: Tensor) -> int:
    """The number of classes that labels show, with the tokens where each of those has a label.

    Args:
        x: (N, ...) samples.
        y: (N,), or of x's shape; int64; at least one.

    Example:
        >>> count_classes(torch.tensor([[7, 1]]), torch.tensor([[1, 2]])), count_classes(torch.tensor([[7, 1]]), torch.tensor([2]))
        (8, 3)
    """
    # By numpy: torch has no maximum of uint16, in which tokens are often kept.
    return max(0, *(int(part.cpu().numpy().max()) for part in ((x, y) if y.ndim > 1 else (y,)))) + 1


def _known_classes(dataset: Any, where: str, of_tokens: bool) -> int | None:
    """The number of classes of a map-style data set if it can be had without reading its samples one by one."""
    tensors = getattr(dataset, "tensors", None)
    if of_tokens and isinstance(dataset, torch.utils.data.Subset):
        return _known_classes(dataset.dataset, where, of_tokens)
    if of_tokens:
        return count_classes(*tensors) if isinstance(tensors, tuple) and len(tensors) == 2 else None
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, list | tuple) and classes:
        return len(classes)
    labels = getattr(dataset, "targets", None)
    if labels is None:
        labels = tensors[-1] if isinstance(tensors, tuple) else None
    if labels is None and isinstance(dataset, torch.utils.data.Subset):
        return _known_classes(dataset.dataset, where, of_tokens)
    return None if labels is None else max(int(as_labels(labels, where).max()) + 1, 1)

"""Data splits (training or test samples by index): from arrays, and from map-style PyTorch data sets."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.errors import DataError, LowMemError
from lowmem_pnn.sources.arrays import as_label, as_labels, as_tensor, count_classes, hash_tensor
from lowmem_pnn.sources.given import as_pair, require_map_style
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.sources.preprocessing import InputForm, Preprocessing, holds_tokens

Indices: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]]"

# Number of samples that stand for all samples of a map-style data set in its fingerprint.
_NUM_PROBES = 16
# Bytes of an array that are checked at a time.
_CHECKED_BYTES = 4 << 20


class Split(Protocol):
    """Part of a data set, for training, validation or test: a fixed sample at every index."""

    def __len__(self) -> int:
        """Return the number of samples, at least 1."""
        ...

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return samples as the model takes them, and their classes.

        Args:
            indices: Numbers of B samples, from 0 to below the length, in any order, also repeated.

        Returns:
            Samples (B, ...), float32 (int64 for tokens), and labels (B, *label_shape), int64; contiguous and the caller's own. The
            label shape is (), or that of a sample where each token has a label.

        Raises:
            DataError: A sample holds NaN or infinity, or has a label or a labelled token that is no class; the message names it.
            IndexError: An index is out of range.
        """
        ...


class SampleSplit:
    """Base class of the package's own splits: reads raw samples, preprocesses and checks them."""

    preprocessing: Preprocessing
    num_classes: int
    where: str
    """Name of the split in messages."""
    label_shape: tuple[int, ...] = ()
    skipped: Mapping[str, str] = {}
    """Broken samples that were left out, by name, with what is wrong with each."""

    def __init__(self, num_samples: int) -> None:
        # Numbers, as the source counts, of the samples that are left.
        self._kept = np.arange(num_samples)

    def __len__(self) -> int:
        return len(self._kept)

    def skip(self, broken: Mapping[int, str]) -> None:
        """Leave out samples; the others move up, and messages go on naming them as before.

        Args:
            broken: What is wrong with each of them, by their numbers.

        Raises:
            DataError: No sample would be left.
        """
        left = np.array([number for number in self._kept if int(number) not in broken], dtype=np.int64)
        if not len(left):
            number, reason = next(iter(broken.items()))
            raise DataError(
                f"{self.where}: all {len(broken):,} samples are broken, such as sample {self._name(np.int64(number))}, which {reason}; "
                "repair some of them"
            )
        self._kept = left
        self.skipped = {f"sample {self._name(np.int64(number))} of {self.where}": reason for number, reason in broken.items()}

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return samples and classes; see `Split.batch`."""
        numbers = self._kept[as_indices(indices, len(self))]
        raw, labels = self._raw(numbers)
        x = self.preprocessing(raw)
        # Bytes are always finite; to check them would be a pass over the batch for nothing.
        if self.preprocessing.raw_dtype.is_floating_point and not bool(torch.isfinite(x).all()):
            finite = torch.isfinite(x).reshape(len(x), -1).all(dim=1)
            worst = int((~finite).nonzero()[0])
            value = _what_is_not_finite(x[worst])
            raise DataError(
                f"sample {self._name(numbers[worst])} of {self.where} holds {value}; repair it or leave it out (--skip-broken)"
            )
        self._check_classes(labels, "label", numbers)
        if self.label_shape:
            # A label is the token that comes next: both are numbers of one vocabulary.
            self._check_classes(x, "token", numbers)
        return x, labels

    def _check_classes(self, values: Tensor, kind: str, numbers: npt.NDArray[np.int64]) -> None:
        """Refuse labels or tokens (B, ...) that are no class."""
        wrong = (values < 0) | (values >= self.num_classes)
        if bool(wrong.any()):
            worst = int(wrong.nonzero()[0, 0])
            raise DataError(
                f"sample {self._name(numbers[worst])} of {self.where} has {kind} {int(values[wrong][0])}, outside 0 to "
                f"{self.num_classes - 1} ({self.num_classes} classes); number the classes from 0"
            )

    def fingerprint(self) -> str:
        """Return a hash that changes when the samples or labels do."""
        raise NotImplementedError

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Read raw samples (B, *raw_shape) and int64 labels (B, *label_shape), into fresh memory."""
        raise NotImplementedError

    def _name(self, number: np.int64) -> str:
        """Return the name of a sample in messages."""
        return str(number)


class ArraySplit(SampleSplit):
    """Split whose samples are in memory as one tensor.

    Args:
        x: Raw samples (N, ...) of any real dtype, neither copied nor changed.
        y: Labels (N,) or, with a label for each token, of x's shape; int64.
        num_classes: Number of classes; labels are below it.
        input_form: Form of the samples that the model takes.
        where: Name of the split in messages.
    """

    def __init__(self, x: Tensor, y: Tensor, num_classes: int, input_form: InputForm, where: str) -> None:
        _require_samples(len(x), where)
        if len(x) != len(y):
            raise DataError(f"{where}: {len(x):,} samples but {len(y):,} labels; give one label for each sample")
        super().__init__(len(x))
        self.num_classes, self.where = num_classes, where
        self.label_shape = tuple(y.shape[1:])
        self.preprocessing = Preprocessing.choose(tuple(x.shape[1:]), x.dtype, input_form, where)
        self._x, self._y = x, y

    def check(self) -> None:
        """Check every sample: better now than when the last of them is first read, after the training.

        Raises:
            DataError: A sample or label is not usable, as for `batch`.
        """
        if self.preprocessing.raw_dtype.is_floating_point or self.label_shape:
            step = max(1, _CHECKED_BYTES // max(1, self._x[0].nbytes))
            for begin in range(0, len(self), step):
                self.batch(np.arange(begin, min(begin + step, len(self))))

    def skip_broken(self) -> None:
        """Leave out the samples that hold NaN or infinity, as the model would see them.

        Raises:
            DataError: All of them do.
        """
        if not self.preprocessing.raw_dtype.is_floating_point:
            return
        broken: dict[int, str] = {}
        step = max(1, _CHECKED_BYTES // max(1, self._x[0].nbytes))
        for begin in range(0, len(self._x), step):
            x = self.preprocessing(self._x[begin : begin + step].clone()).flatten(1)
            for row in (~torch.isfinite(x).all(dim=1)).nonzero().flatten().tolist():
                broken[begin + row] = f"holds {_what_is_not_finite(x[row])}"
        if broken:
            self.skip(broken)

    def fingerprint(self) -> str:
        """Return a hash of the values; of very large arrays, of evenly spaced pieces and a sum."""
        digest = hashlib.sha256()
        hash_tensor(digest, self._x)
        hash_tensor(digest, self._y)
        return digest.hexdigest()

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(numbers)
        return self._x.index_select(0, index), self._y.index_select(0, index)


class MapSplit(SampleSplit):
    """Split of a map-style data set, with (x, class number) or tokens (x, y) at each index, read when asked for.

    Args:
        dataset: Data set with `__len__` and `__getitem__`, without random transforms; x is a tensor, an array, a number or a PIL image.
        num_classes: Number of classes; labels are below it. None to count the classes, see `from_torch`.
        input_form: Form of the samples that the model takes.
        where: Name of the split in messages.
        skip_broken: Whether to read every sample once, and to leave out those that raise, hold NaN or infinity, or are of another
            form than most.
    """

    def __init__(
        self, dataset: Any, num_classes: int | None, input_form: InputForm, where: str, skip_broken: bool = False
    ) -> None:
        _require_samples(len(dataset), where)
        super().__init__(len(dataset))
        self.where = where
        self._dataset, self._input_form = dataset, input_form
        if skip_broken and (broken := self._find_broken()):
            self.skip(broken)
        first, label = self._sample(int(self._kept[0]))
        self.label_shape = tuple(label.shape)
        self.preprocessing = Preprocessing.choose(tuple(first.shape), first.dtype, input_form, where)
        self.num_classes = self._count_classes() if num_classes is None else num_classes

    def fingerprint(self) -> str:
        """Return a hash of the length and of a few evenly spaced samples.

        Raises:
            DataError: A sample differs when it is read again.
        """
        digest = hashlib.sha256(f"{len(self)}{''.join(self.skipped)}".encode())
        for number in self._kept[np.unique(np.linspace(0, len(self) - 1, _NUM_PROBES).astype(np.int64))]:
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
        """Return the number of classes; where each token has a label, one more than the largest token or label."""
        known = _known_classes(self._dataset, self.where, self.label_shape != ())
        if known is not None:
            return known
        return max(count_classes(x[None], label[None]) for x, label in map(self._sample, self._kept.tolist()))

    def _find_broken(self) -> dict[int, str]:
        """Read every sample, and say what is wrong with those that cannot be used."""
        forms: dict[int, str] = {}
        broken: dict[int, str] = {}
        for number in self._kept.tolist():
            try:
                x, label = self._sample(number)
            except DataError as error:
                reason = error.__cause__ or error
                broken[number] = f"cannot be read: {one_line(reason) if reason is error.__cause__ else error}"
                continue
            if x.dtype.is_floating_point and not bool(torch.isfinite(floats := x.to(torch.float32)).all()):
                broken[number] = f"holds {_what_is_not_finite(floats)}"
            else:
                labels = f", its labels {tuple(label.shape)}" if label.ndim else ""
                forms[number] = f"{tuple(x.shape)} {x.dtype}{labels}"
        if forms:
            usual = Counter(forms.values()).most_common(1)[0][0]
            broken |= {number: f"is {form}, most are {usual}" for number, form in forms.items() if form != usual}
        return dict(sorted(broken.items()))

    def _sample(self, number: int) -> tuple[Tensor, Tensor]:
        where = f"sample {number} of {self.where}"
        try:
            item = self._dataset[number]
            # An image may be read from its file only now.
            if isinstance(item, tuple | list) and len(item) == 2:
                x = as_tensor(item[0], where)
                return x, as_label(item[1], where, tuple(x.shape) if holds_tokens(x.dtype, self._input_form) else None)
        except (LowMemError, MemoryError):
            raise
        # Whatever a user's data set raises is the user's to see, on one line, with the original as the cause.
        except Exception as error:
            raise DataError(f"{where} cannot be read: {one_line(error)}; repair it or leave it out (--skip-broken)") from error
        content = f"{len(item)} values" if isinstance(item, tuple | list) else f"a {type(item).__name__}"
        raise DataError(f"{where} is {content}; a data set must give pairs (x, class number)")

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        expected = self.preprocessing
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


def from_torch(
    dataset: Any,
    *,
    num_classes: int | None = None,
    input_form: InputForm = "any",
    where: str = "the data set",
    skip_broken: bool = False,
) -> SampleSplit:
    """Make a split of a PyTorch data set or of tensors.

    Args:
        dataset: Map-style data set of (x, class number), or a pair of tensors, arrays, tables or lists (x, y). Tokens, which are
            integers of a shape (N, T), may have a label each: y of the same shape.
        num_classes: Number of classes. None to take it from the data set's `classes` or labels; without those every sample is read
            once. Where tokens have labels, it is one more than the largest token or label.
        input_form: Form of the samples that the model takes.
        where: Name of the split in messages.
        skip_broken: Read every sample once, and leave out those that raise, hold NaN or infinity, or are of another form than most.

    Raises:
        DataError: The data set is empty, is not indexed, or does not hold such pairs.

    Example:
        >>> split = from_torch((torch.zeros(6, 28, 28, dtype=torch.uint8), torch.arange(6)), input_form="flat")
        >>> x, y = split.batch([4, 1])
        >>> x.shape, y
        (torch.Size([2, 784]), tensor([4, 1]))
    """
    if isinstance(dataset, SampleSplit):
        return dataset
    if (pair := as_pair(dataset)) is not None:
        x = as_tensor(pair[0], where)
        y = as_labels(pair[1], where, tuple(x.shape) if holds_tokens(x.dtype, input_form) else None)
        if x.ndim < 1 or y.ndim < 1:
            raise DataError(f"{where}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; give x (N, ...) and y (N,)")
        _require_samples(len(y), where)
        split = ArraySplit(x, y, count_classes(x, y) if num_classes is None else num_classes, input_form, where)
        if skip_broken:
            split.skip_broken()
        return split
    require_map_style(dataset, where)
    _require_samples(len(dataset), where)
    return MapSplit(dataset, num_classes, input_form, where, skip_broken)


def _what_is_not_finite(x: Tensor) -> str:
    return "NaN" if bool(x.isnan().any()) else "an infinite value"


def _require_samples(num_samples: int, where: str) -> None:
    if not num_samples:
        raise DataError(f"{where} is empty: it holds 0 samples; give at least 1")


def as_indices(indices: Indices, length: int) -> npt.NDArray[np.int64]:
    """Check indices before anything is read: a negative one would silently be counted from the end.

    Args:
        indices: Numbers of samples, as `Split.batch` takes them.
        length: Number of samples in the split.

    Raises:
        IndexError: There are no indices, they are no integers, or one is out of range.
    """
    numbers = np.asarray(indices)
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
        raise IndexError(f"indices of shape {numbers.shape} and dtype {numbers.dtype}; give one axis of at least one integer")
    if numbers.min() < 0 or numbers.max() >= length:
        raise IndexError(f"indices from {numbers.min()} to {numbers.max()} for {length:,} samples; give 0 to {length - 1:,}")
    return numbers.astype(np.int64)


def _known_classes(dataset: Any, where: str, of_tokens: bool) -> int | None:
    """Return the number of classes of a map-style data set if that is known without reading the samples one by one."""
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
    if labels is None:
        return None
    try:
        numbers = as_labels(labels, where)
    except DataError:
        # A data set may turn what it calls `targets` into class numbers as a sample is read.
        return None
    return max(int(numbers.max()) + 1, 1) if numbers.numel() else None

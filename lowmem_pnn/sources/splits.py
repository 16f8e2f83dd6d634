"""Data splits: training, validation or test samples by index, with their targets; and the split of samples that are in memory."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from lowmem_pnn.errors import DataError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.arrays import fits_bytes, hash_tensor
from lowmem_pnn.sources.draws import DrawKey, probes_of, same_values
from lowmem_pnn.sources.npz_file import mapped_member
from lowmem_pnn.sources.preprocessing import InputForm, Preprocessing
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.sources.targets import Targets

Indices: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]]"

# Bytes of an array that are checked at a time.
_CHECKED_BYTES = 4 << 20


class Split(Protocol):
    """Part of a data set, for training, validation or test: a fixed sample at every index."""

    def __len__(self) -> int:
        """Return the number of samples, at least 1."""
        ...

    def batch(self, indices: Indices) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Return samples as the model takes them, and their targets.

        Args:
            indices: Numbers of B samples, from 0 to below the length, in any order, also repeated.

        Returns:
            Samples (B, ...), float32 (int64 for tokens), or a tuple of these where a sample is several tensors; and targets (B, ...) in
            the form that the data set's `Targets` says; contiguous and the caller's own.

        Raises:
            DataError: A sample holds NaN or infinity, or has a label or a labelled token that is no class; the message names it.
            IndexError: An index is out of range.
        """
        ...


class SampleSplit:
    """Base class of the package's own splits: reads raw samples, preprocesses and checks them."""

    preprocessing: Preprocessing
    where: str
    """Name of the split in messages."""
    targets: Targets
    """Form of the samples' targets."""
    structure: TreeSpec | None = None
    """Structure of a sample's tensors; None where a sample is one tensor."""
    skipped: Mapping[str, str] = {}
    """Broken samples that were left out, by name, with what is wrong with each."""
    classes: tuple[str, ...] = ()
    """Names of the classes by their numbers, where they go with the samples; else none."""
    columns: tuple[str, ...] = ()
    """Names of the columns, where samples are rows of a table that was given whole; else none."""
    notes: tuple[str, ...] = ()
    """What is said of samples that are other ones than the source gives, a line each."""
    paths: Sequence[Path] | None = None
    """Files of the samples, as the source counts them; None where samples have no files."""
    places: npt.NDArray[np.int64]
    """Place of each sample in its source, from 0: it moves up where one before it was left out, and its place stays."""
    is_random: bool = False
    """Whether the data set draws at random while it gives a sample: `batch` then takes a key, from which the draws follow."""
    uses_generators: bool = False
    """Whether reading changes the global random generators for a moment, so that nothing else may draw from them meanwhile."""

    def __init__(self, num_samples: int) -> None:
        # Numbers, as the source counts, of the samples that are left.
        self._kept = self.places = np.arange(num_samples)

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
        self._kept = self.places = left
        self.skipped = {f"sample {self._name(np.int64(number))} of {self.where}": reason for number, reason in broken.items()}

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return samples and targets; see `Split.batch`."""
        numbers = self._kept[as_indices(indices, len(self))]
        return self._presented(numbers, *self._raw(numbers))

    def _presented(self, numbers: npt.NDArray[np.int64], raw: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw samples as the model takes them, and their targets, both checked."""
        x = self.preprocessing(raw)
        # Bytes are always finite; to check them would be a pass over the batch for nothing.
        if self.preprocessing.raw_dtype.is_floating_point and not bool(torch.isfinite(x).all()):
            finite = torch.isfinite(x).reshape(len(x), -1).all(dim=1)
            worst = int((~finite).nonzero()[0])
            value = what_is_not_finite(x[worst])
            raise DataError(
                f"sample {self._name(numbers[worst])} of {self.where} holds {value}; repair it or leave it out (--skip-broken)"
            )
        if self.targets.are_classes:
            self._check_classes(labels, "label", numbers, self.targets.ignored)
        if self.targets.kind == "tokens":
            # A label is the token that comes next: both are numbers of one vocabulary.
            self._check_classes(x, "token", numbers)
        return x, labels

    def _check_classes(self, values: Tensor, kind: str, numbers: npt.NDArray[np.int64], ignored: int | None = None) -> None:
        """Refuse labels or tokens (B, ...) that are no class, and not left out either."""
        wrong = (values < 0) | (values >= self.num_classes)
        if ignored is not None and bool(wrong.any()):
            wrong &= values != ignored
        if bool(wrong.any()):
            worst = int(wrong.nonzero()[0, 0])
            raise DataError(
                f"sample {self._name(numbers[worst])} of {self.where} has {kind} {int(values[wrong][0])}, outside 0 to "
                f"{self.num_classes - 1} ({self.num_classes} classes); number the classes from 0"
            )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Tensors of one sample, as the model takes them."""
        return (TensorSpec(self.preprocessing.shape, self.preprocessing.dtype),)

    @property
    def num_classes(self) -> int:
        """Number of classes; see `Targets`."""
        return self.targets.num_classes

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of one sample's target."""
        return self.targets.shape

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Return targets (B, ...) alone, of samples by their numbers."""
        return self._raw(self._kept[numbers])[1]

    def files(self, numbers: npt.NDArray[np.int64]) -> list[Path] | None:
        """Return the files of samples by their numbers; None where samples have no files."""
        return None if self.paths is None else [self.paths[int(number)] for number in self._kept[numbers]]

    def fingerprint(self) -> str:
        """Return a hash that changes when the samples or labels do."""
        raise NotImplementedError

    def _probes(self) -> list[int]:
        """Return the numbers, as the source counts, of a few evenly spaced samples."""
        return [int(number) for number in self._kept[probes_of(len(self))]]

    def _read_twice(self, read: Callable[[int], Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
        """Yield the tensors of a few evenly spaced samples.

        Raises:
            DataError: A sample differs when it is read again, with the same seed where the data set draws at random.
        """
        for number in self._probes():
            once, again = read(number), read(number)
            if not all(map(same_values, once, again)):
                raise DataError(
                    f"sample {number} of {self.where} differs when it is read again, with the generators of torch, numpy and Python's random "
                    "seeded alike; have its random transforms draw from one of these, or take them out of the data set"
                )
            yield once

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Read raw samples (B, *raw_shape) and targets (B, ...), into fresh memory."""
        raise NotImplementedError

    def _name(self, number: np.int64) -> str:
        """Return the name of a sample in messages."""
        return str(number)


class ArraySplit(SampleSplit):
    """Split whose samples are in memory as one tensor.

    Args:
        x: Raw samples (N, ...) of any real dtype, neither copied nor changed.
        y: Targets (N, ...), as `targets` says.
        targets: Form of the targets.
        input_form: Form of the samples that the model takes.
        where: Name of the split in messages.
        resize: Brings images to one size; None to leave them as they are.
    """

    def __init__(
        self, x: Tensor, y: Tensor, targets: Targets, input_form: InputForm, where: str, resize: Resize | None = None
    ) -> None:
        require_samples(len(x), where)
        if len(x) != len(y):
            raise DataError(f"{where}: {len(x):,} samples but {len(y):,} labels; give one label for each sample")
        super().__init__(len(x))
        self.targets, self.where = targets.of_size(resize), where
        self.preprocessing = Preprocessing.choose(tuple(x.shape[1:]), x.dtype, input_form, where, resize=resize)
        self._x, self._y, self._resize = x, y, resize if targets.kind == "mask" else None
        self._map = mapped_member(x)

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """See `SampleSplit.labels`."""
        return self._targets(torch.from_numpy(self._kept[numbers]))

    @property
    def y(self) -> Tensor:
        """Targets of all samples, (N, ...), as they are kept."""
        return self._y

    def check(self) -> None:
        """Check every sample: better now than when the last of them is first read, after the training.

        Raises:
            DataError: A sample or label is not usable, as for `batch`.
        """
        if self.preprocessing.raw_dtype.is_floating_point or self.targets.kind in ("tokens", "mask"):
            step = max(1, _CHECKED_BYTES // max(1, self._x[0].nbytes))
            for begin in range(0, len(self), step):
                self.batch(np.arange(begin, min(begin + step, len(self))))
        elif self.targets.kind == "class":
            self._check_classes(self.labels(np.arange(len(self))), "label", self._kept, self.targets.ignored)

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
            x = self.preprocessing(self.preprocessing.resized(self._x[begin : begin + step].clone())).flatten(1)
            for row in (~torch.isfinite(x).all(dim=1)).nonzero().flatten().tolist():
                broken[begin + row] = f"holds {what_is_not_finite(x[row])}"
        if broken:
            self.skip(broken)

    def fingerprint(self) -> str:
        """Return a hash of the values; of very large arrays, of evenly spaced pieces and a sum."""
        digest = hashlib.sha256()
        hash_tensor(digest, self._x)
        hash_tensor(digest, self._y)
        return digest.hexdigest()

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        if self._map is not None:
            self._map.check()
        index = torch.from_numpy(numbers)
        return self.preprocessing.resized(self._x.index_select(0, index)), self._targets(index)

    def _targets(self, index: Tensor) -> Tensor:
        kept = self._y.index_select(0, index)
        if self._resize is not None:
            kept = self._resize.masks(kept, self.targets.outside)
        # Another part of the data may hold what takes a wider type; and tokens are cast as late as here.
        return kept.to(self.targets.dtype)


def read_samples(split: Any, indices: Indices, key: DrawKey | None) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
    """Return samples and targets of any split, with what is drawn for a key, where one is given.

    Args:
        split: A split; one whose samples are always the same takes no key.
        indices: Numbers of B samples.
        key: What random changes of samples follow from; None for samples as they are.
    """
    samples: tuple[Tensor | tuple[Tensor, ...], Tensor] = split.batch(indices) if key is None else split.batch(indices, key)
    return samples


def of_all(targets: Targets, kept: Iterable[Tensor]) -> Targets:
    """Return the form of targets of which some were looked at, with the classes of all; masks become bytes where these hold them.

    Args:
        targets: The form.
        kept: All targets that are class numbers, one by one, as they are kept.
    """
    count, is_small = 1, targets.kind == "mask" and 0 <= targets.outside < 256
    for one in kept:
        count = max(count, targets.count(one))
        is_small = is_small and fits_bytes(one)
    return dataclasses.replace(targets, num_classes=count, dtype=torch.uint8 if is_small else targets.dtype)


def what_is_not_finite(x: Tensor) -> str:
    """Return in words what a tensor holds that is no number."""
    return "NaN" if bool(x.isnan().any()) else "an infinite value"


def require_samples(num_samples: int, where: str) -> None:
    """Refuse a part without samples."""
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

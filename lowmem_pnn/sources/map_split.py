"""Splits of map-style PyTorch data sets, whose samples are read when they are asked for; and of whatever else Python code gives."""

import dataclasses
import hashlib
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowmem_pnn.errors import ConfigError, DataError, LowMemError
from lowmem_pnn.sources.arrays import as_labels, as_tensor, count_classes, hash_tensor
from lowmem_pnn.sources.draws import DrawKey, SampleReader
from lowmem_pnn.sources.given import (
    as_pair,
    as_sample,
    class_names,
    column_names,
    first_of_each_class,
    known_classes,
    listed_target,
    require_map_style,
)
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.sources.preprocessing import InputForm, Preprocessing, holds_tokens
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.sources.splits import (
    ArraySplit,
    Indices,
    SampleSplit,
    as_indices,
    of_all,
    require_samples,
    what_is_not_finite,
)
from lowmem_pnn.sources.structured_split import StructuredSplit, from_structured_arrays, is_structured
from lowmem_pnn.sources.targets import TargetOptions, Targets, find_targets


class MapSplit(SampleSplit):
    """Split of a map-style data set, with (x, target) at each index, read when asked for.

    Args:
        dataset: Data set with `__len__` and `__getitem__`; x is a tensor, an array, a number or a PIL image. What it draws at random
            follows from the key of a reading.
        num_classes: Number of classes; labels are below it. None to count the classes, see `from_torch`.
        input_form: Form of the samples that the model takes.
        where: Name of the split in messages.
        skip_broken: Whether to read every sample once, and to leave out those that raise, hold NaN or infinity, or are of another
            form than most.
        options: What is known of the targets.
        resize: Brings images to one size; None to leave them as they are.
    """

    def __init__(
        self,
        dataset: Any,
        num_classes: int | None,
        input_form: InputForm,
        where: str,
        skip_broken: bool = False,
        options: TargetOptions = TargetOptions(),  # noqa: B008 - it is frozen
        resize: Resize | None = None,
    ) -> None:
        require_samples(len(dataset), where)
        super().__init__(len(dataset))
        self.where = where
        self._dataset, self._input_form, self._resize = dataset, input_form, resize
        self._reader = SampleReader(dataset, len(dataset))
        with self._reader.noticing():
            if skip_broken and (broken := self._find_broken()):
                self.skip(broken)
            first, _ = self._item(int(self._kept[0]))
            self.preprocessing = self._preprocessing(first)
            found = self._find_targets(tuple(first.shape), holds_tokens(first.dtype, input_form), options)
            self.targets = found.of_size(resize)
            if self.targets.are_classes:
                self.targets = self._counted() if num_classes is None else self._of_classes(num_classes)
                self._read_each_class()
            names = class_names(dataset) if self.targets.kind == "class" else ()
            if names and len(names) == self.targets.num_classes and self._gives_what_it_lists():
                self.classes = names
        self.is_random, self.uses_generators = self._reader.is_random, self._reader.uses_generators

    def batch(self, indices: Indices, key: DrawKey | None = None) -> tuple[Tensor, Tensor]:
        """Return samples and targets; see `Split.batch`.

        Args:
            indices: Numbers of B samples.
            key: What the data set draws at random follows from this and a sample's number; None for the same samples always.
        """
        numbers = self._kept[as_indices(indices, len(self))]
        return self._presented(numbers, *self._raw(numbers, key))

    def _preprocessing(self, x: Tensor) -> Preprocessing:
        return Preprocessing.choose(tuple(x.shape), x.dtype, self._input_form, self.where, resize=self._resize)

    def fingerprint(self) -> str:
        """Return a hash of the length and of a few evenly spaced samples.

        Raises:
            DataError: A sample differs when it is read again.
        """
        digest = hashlib.sha256(f"{len(self)}{''.join(self.skipped)}".encode())
        for x, label in self._read_twice(self._sample):
            hash_tensor(digest, x)
            digest.update(str(label.tolist()).encode())
        return digest.hexdigest()

    def _find_targets(self, sample_shape: tuple[int, ...], tokens: bool, options: TargetOptions) -> Targets:
        """Find out what targets are: of the first sample where it is a class number, else of a few."""
        own = options.task == "own"
        values = []
        for number in self._probes():
            leaves, tree = pytree.tree_flatten(self._item(number)[1] if own else [self._item(number)[1]])
            where = f"sample {number} of {self.where}"
            values.append([_target_tensor(leaf, where) for leaf in leaves])
            of_class = not own and not values[0][0].dtype.is_floating_point and values[0][0].numel() == 1
            if of_class and options.task in ("auto", "classification"):
                break
        # One of another shape is refused by name when it is read.
        shapes = [tensor.shape for tensor in values[0]]
        values = [tensors for tensors in values if [tensor.shape for tensor in tensors] == shapes]
        stacked = [torch.stack(tensors) for tensors in zip(*values, strict=True)]
        whole = pytree.tree_unflatten(stacked, tree)
        found = whole if own else whole[0]
        return find_targets(found, self.where, options, sample_shape, tokens=tokens, are_all=False)

    def _of_classes(self, num_classes: int) -> Targets:
        """Return the form of the targets with a number of classes; masks are bytes where these hold all of them."""
        targets = self.targets.of_classes(num_classes)
        is_small = targets.kind == "mask" and num_classes <= 256 and 0 <= targets.outside < 256
        return dataclasses.replace(targets, dtype=torch.uint8) if is_small else targets

    def _counted(self) -> Targets:
        """Return the form of the targets with the number of classes: where each token has a label, one more than the largest of both."""
        of_tokens = self.targets.kind == "tokens"
        known = None if self.targets.kind == "mask" else known_classes(self._dataset, self.where, self.targets)
        if known is not None:
            return self.targets.of_classes(known)
        found = of_all(self.targets, (label for _, label in map(self._sample, self._kept.tolist())))
        if of_tokens:
            counts = [count_classes(x[None], x[None]) for x, _ in map(self._sample, self._kept.tolist())]
            found = found.of_classes(max(found.num_classes, *counts))
        return found.of_size(self._resize)

    def _read_each_class(self) -> None:
        """Read a sample of each class, where the data set has a list of them: those of one class alone may draw at random."""
        for number in first_of_each_class(self._dataset):
            # What cannot be read is said where it is wanted.
            with suppress(Exception):
                self._reader.read(number)

    def _gives_what_it_lists(self) -> bool:
        """Return whether a few samples have the targets that the data set lists for them: one of a class of its own may have others."""
        listed = {number: listed_target(self._dataset, number) for number in self._probes()}
        return all(target is None or int(self._sample(number)[1]) == target for number, target in listed.items())

    def _find_broken(self) -> dict[int, str]:
        """Read every sample, and say what is wrong with those that cannot be used."""
        forms: dict[int, str] = {}
        broken: dict[int, str] = {}
        for number in self._kept.tolist():
            try:
                x, target = self._item(number)
                labels = [_target_tensor(leaf, f"sample {number} of {self.where}") for leaf in pytree.tree_leaves(target)]
            except DataError as error:
                reason = error.__cause__ or error
                broken[number] = f"cannot be read: {one_line(reason) if reason is error.__cause__ else error}"
                continue
            if x.dtype.is_floating_point and not bool(torch.isfinite(floats := x.to(torch.float32)).all()):
                broken[number] = f"holds {what_is_not_finite(floats)}"
            elif any(label.dtype.is_floating_point and not bool(torch.isfinite(label).all()) for label in labels):
                broken[number] = "has a target that is NaN or infinite"
            else:
                shapes = [str(tuple(label.shape)) for label in labels if label.numel() != 1]
                try:
                    shape = tuple(x.shape) if self._resize is None else self._preprocessing(x).raw_shape
                except DataError as error:
                    broken[number] = str(error)
                    continue
                forms[number] = f"{shape} {x.dtype}" + (f", its labels {', '.join(shapes)}" if shapes else "")
        if forms:
            usual = Counter(forms.values()).most_common(1)[0][0]
            broken |= {number: f"is {form}, most are {usual}" for number, form in forms.items() if form != usual}
        return dict(sorted(broken.items()))

    def _sample(self, number: int, key: DrawKey | None = None) -> tuple[Tensor, Tensor]:
        """Return a sample as it is stored, and its target as it is kept."""
        x, target = self._item(number, key)
        if self._resize is not None and self.targets.kind == "mask":
            mask = as_tensor(target, f"the labels of sample {number} of {self.where}", palette=True)
            sides = (x.shape[-2:], x.shape[:2])
            if mask.shape[-2:] not in sides:
                raise DataError(
                    f"sample {number} of {self.where} has an image {tuple(x.shape)} and a mask {tuple(mask.shape)}; give both one size"
                )
            target = self._resize.masks(mask, self.targets.outside)
        return x, self.targets.convert(target, f"sample {number} of {self.where}", batched=False, remedy=" (--skip-broken)")

    def _item(self, number: int, key: DrawKey | None = None) -> tuple[Tensor, Any]:
        """Return a sample as it is stored, and its target as the data set gives it."""
        where = f"sample {number} of {self.where}"
        try:
            x, target = as_sample(self._reader.read(number, key), where)
            return as_tensor(x, where), target  # an image may be read from its file only now
        except (LowMemError, MemoryError):
            raise
        # Whatever a user's data set raises is the user's to see, on one line, with the original as the cause.
        except Exception as error:
            raise DataError(f"{where} cannot be read: {one_line(error)}; repair it or leave it out (--skip-broken)") from error

    def _raw(self, numbers: npt.NDArray[np.int64], key: DrawKey | None = None) -> tuple[Tensor, Tensor]:
        expected = self.preprocessing
        xs: list[Tensor] = []
        labels: list[Tensor] = []
        for number in numbers:
            x, label = self._sample(int(number), key)
            form = tuple(x.shape), x.dtype
            if self._resize is not None and form[0] != expected.raw_shape:
                self._preprocessing(x)  # which refuses what cannot be resized
                x = expected.resized(x[None])[0]
            if (tuple(x.shape), x.dtype) != (expected.raw_shape, expected.raw_dtype):
                hint = (
                    ", or images of one kind and --image-size"
                    if len(expected.raw_shape) in (2, 3) and self._resize is None
                    else ""
                )
                raise DataError(
                    f"sample {self._name(number)} of {self.where} is {form[0]} {form[1]}, sample 0 is "
                    f"{expected.raw_shape} {expected.raw_dtype}; give all samples one shape and dtype{hint}"
                )
            xs.append(x)
            labels.append(label)
        return torch.stack(xs), torch.stack(labels)


def _target_tensor(value: Any, where: str) -> Tensor:
    """Return part of a target as a tensor; words are refused, with what to write instead."""
    return as_labels(value, where) if isinstance(value, str | bytes) else as_tensor(value, f"the labels of {where}", palette=True)


def from_torch(
    dataset: Any,
    *,
    num_classes: int | None = None,
    input_form: InputForm = "any",
    where: str = "the data set",
    skip_broken: bool = False,
    options: TargetOptions = TargetOptions(),  # noqa: B008 - it is frozen
    resize: Resize | None = None,
) -> SampleSplit:
    """Make a split of a PyTorch data set or of tensors.

    Args:
        dataset: Map-style data set of (x, target), or a pair of tensors, arrays, tables or lists (x, y). What targets may be says
            `lowmem_pnn.sources.targets`.
        num_classes: Number of classes, where targets are class numbers. None to take it from the data set's `classes` or labels;
            without those every sample is read once. Where tokens have labels, it is one more than the largest token or label.
        input_form: Form of the samples that the model takes.
        where: Name of the split in messages.
        skip_broken: Read every sample once, and leave out those that raise, hold NaN or infinity, or are of another form than most.
        options: What is known of the targets.
        resize: Brings images to one size; None to leave them as they are.

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
        if isinstance(pair[0], dict | tuple):
            refuse_skipping(skip_broken, where)
            return from_structured_arrays(pair[0], pair[1], where, options)
        x = as_tensor(pair[0], where)
        split = from_arrays(
            x, pair[1], num_classes=num_classes, input_form=input_form, where=where, options=options, resize=resize
        )
        split.columns = column_names(pair[0])
        if skip_broken:
            split.skip_broken()
        return split
    require_map_style(dataset, where)
    require_samples(len(dataset), where)
    if _is_structured(dataset):
        refuse_skipping(skip_broken, where)
        return StructuredSplit(dataset, len(dataset), where, options)
    return MapSplit(dataset, num_classes, input_form, where, skip_broken, options, resize)


def refuse_skipping(skip_broken: bool, where: str) -> None:
    """Refuse to leave out samples of several tensors.

    Args:
        skip_broken: whether that is asked for.
        where: name of the data in messages.

    Raises:
        ConfigError: it is.
    """
    if skip_broken:
        raise ConfigError(
            f"--skip-broken: samples of {where} are several tensors, of which none is left out; leave the option out"
        )


def _is_structured(dataset: Any) -> bool:
    """Decide by the first sample of a data set whether samples are several tensors; what cannot be read is said later."""
    with suppress(Exception):
        return is_structured(as_sample(dataset[0], "")[0])
    return False


def from_arrays(
    x: Tensor,
    y: Any,
    *,
    num_classes: int | None,
    input_form: InputForm,
    where: str,
    options: TargetOptions = TargetOptions(),  # noqa: B008 - it is frozen
    labels_name: str | None = None,
    resize: Resize | None = None,
) -> ArraySplit:
    """Make a split of samples that are in memory.

    Args:
        x: Samples (N, ...).
        y: Targets (N, ...), as the user gives them.
        num_classes: Number of classes, where targets are class numbers; None to count them.
        input_form: Form of the samples that the model takes.
        where: Name of the split in messages.
        options: What is known of the targets.
        labels_name: Name of the targets in messages; None for that of the split.
        resize: Brings images to one size; None to leave them as they are.

    Raises:
        DataError: There are no samples, their number is not that of the targets, or it is not clear what the targets are.
    """
    y_where = where if labels_name is None else labels_name
    if x.ndim < 1 or (isinstance(y, Tensor | np.ndarray) and y.ndim < 1):
        raise DataError(f"{where}: x has shape {tuple(x.shape)} and y {tuple(np.shape(y))}; give x (N, ...) and y (N,)")
    require_samples(len(x), where)
    tokens = holds_tokens(x.dtype, input_form)
    targets = find_targets(y, y_where, options, tuple(x.shape[1:]), tokens=tokens)
    kept = targets.convert(y, y_where, batched=True)
    if num_classes is not None and targets.are_classes:
        targets = targets.of_classes(num_classes)
    elif targets.kind == "tokens":
        targets = targets.of_classes(max(targets.num_classes, count_classes(x, x)))
    return ArraySplit(x, kept, targets, input_form, where, resize)

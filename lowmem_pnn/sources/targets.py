"""Targets: what is to be predicted of a sample, found out from what a data set gives, and converted to what losses take.

| kind | a sample's target | task |
| --- | --- | --- |
| `class` | one class number | classification |
| `tokens` | a class number for each token of the sample | classification of the token that comes next |
| `probabilities` | a probability for each class | classification |
| `labels` | 0 or 1 for each of several labels | multilabel |
| `values` | one number, or several | regression |
| `mask` | a class number for each pixel of the sample | segmentation |
| `own` | any tensors, which a loss of the user's own understands | own |
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowmem_pnn.errors import DataError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.arrays import (
    FEW_OPERATIONS,
    as_labels,
    as_tensor,
    check_values,
    fits_bytes,
    probabilities,
    refuse_words,
    zeros_and_ones,
)
from lowmem_pnn.sources.packing import Packing
from lowmem_pnn.sources.resize import Resize

TaskName = Literal["auto", "classification", "multilabel", "regression", "segmentation", "own"]
TargetKind = Literal["class", "tokens", "probabilities", "labels", "values", "mask", "own"]

PYTORCH_IGNORED = -100
"""Class number that PyTorch's cross entropy leaves out unless it is told another one."""
MASK_IGNORED = 255
"""Class number that masks have, by custom, where nothing is to be learnt: at the edges of objects."""

# Whole floats up to here are taken for class numbers where nobody says what they are.
_MOST_CLASSES_OF_FLOATS = 1000
# Tokens that are cast at once where they are counted.
_COUNTED_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class TargetOptions:
    """What is known of targets before they are looked at.

    Args:
        task: Task that was asked for; `own` where a loss of the user's own takes whatever targets there are.
        ignored: Class number that losses and scores leave out, where one was asked for.
    """

    task: TaskName = "auto"
    ignored: int | None = None


@dataclass(frozen=True)
class Targets:
    """Form of the targets of a data set.

    Args:
        kind: What a target is.
        num_classes: Number of classes; of labels or values, how many a sample has; 0 where nothing is known of them.
        shape: Shape of one sample's target, as it is kept.
        dtype: Element type, as it is kept: int64, uint8 for masks that bytes hold, float32; of the user's own any.
        ignored: Class number that losses and scores leave out; None where there are no classes.
        packing: How several tensors are kept as one; None where a target is one tensor.
    """

    kind: TargetKind = "class"
    num_classes: int = 1
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.int64
    ignored: int | None = None
    packing: Packing | None = None

    @property
    def spec(self) -> TensorSpec:
        """Shape and element type of one sample's target, as it is kept."""
        return TensorSpec(self.shape, self.dtype)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's target."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def outside(self) -> int:
        """Class number of what is outside of an image that is padded or moved: one that is left out."""
        return MASK_IGNORED if self.ignored is None else self.ignored

    @property
    def are_classes(self) -> bool:
        """Whether targets are class numbers: of samples, tokens or pixels."""
        return self.kind in ("class", "tokens", "mask")

    def zeros(self, num_samples: int) -> Tensor:
        """Return targets (num_samples, ...) that are all zeros.

        Args:
            num_samples: Number of samples.
        """
        return torch.zeros(num_samples, *self.shape, dtype=self.dtype)

    def unpack(self, kept: Tensor) -> Any:
        """Return targets as a loss takes them: one tensor, or the structure that the data set gives.

        Args:
            kept: Targets (B, ...), as they are kept.
        """
        return kept if self.packing is None else self.packing.unpack(kept)

    def of_size(self, resize: Resize | None) -> "Targets":
        """Return the same form, of masks that are resized with their images.

        Args:
            resize: Brings images to one size; None to leave them as they are.
        """
        if resize is None or self.kind != "mask":
            return self
        dtype = self.dtype if 0 <= self.outside < 256 else torch.int64
        return dataclasses.replace(self, shape=(resize.height, resize.width), dtype=dtype)

    def of_classes(self, num_classes: int) -> "Targets":
        """Return the same form, with another number of classes.

        Args:
            num_classes: Number of classes.
        """
        return dataclasses.replace(self, num_classes=num_classes)

    def count(self, kept: Tensor) -> int:
        """Return the number of classes that targets show: one more than the largest that is not left out.

        Args:
            kept: Targets that are class numbers, as they are kept.
        """
        return _count(kept, self.ignored)

    def convert(self, value: Any, where: str, *, batched: bool, remedy: str = "") -> Tensor:
        """Convert targets of this kind to the form in which they are kept.

        Args:
            value: Targets of one sample, or (N, ...) of many, as a data set gives them.
            where: Name of the data in messages.
            batched: Whether they are of many samples.
            remedy: What leaves a broken sample out, in brackets; empty where nothing does.

        Raises:
            DataError: They are not of this kind.
        """
        if self.kind == "own":
            return self._convert_own(value, where, batched=batched)
        tensor = as_tensor(value, f"the labels of {where}", palette=True)
        if not batched:
            tensor = tensor[None]
        if self.kind == "class":
            converted = as_labels(tensor, where).reshape(len(tensor))
        elif self.kind == "tokens":
            # Of all samples as they are: tokens may be a mapped file, larger than memory, and are cast batch by batch.
            converted = tensor if batched and not tensor.dtype.is_floating_point else tensor.to(torch.int64)
        elif self.kind == "mask":
            mask = _without_channel(tensor, where)
            if self.dtype == torch.uint8 and not fits_bytes(mask):
                raise DataError(f"{where} has a mask with classes beyond 0 to 255, and others are bytes; give all one type")
            converted = mask.to(self.dtype)
        else:
            converted = tensor.to(torch.float32)
        if tuple(converted.shape[1:]) != self.shape:
            raise DataError(
                f"{where} has labels of shape {tuple(converted.shape[1:])}, others of {self.shape}; give all samples labels of "
                "one shape"
            )
        if self.kind in ("labels", "probabilities", "values"):
            check_values(converted, self.kind, where, batched=batched, remedy=remedy)
        return converted if batched else converted[0]

    def _convert_own(self, value: Any, where: str, *, batched: bool) -> Tensor:
        leaves, tree = pytree.tree_flatten(value if self.packing is not None else [value])
        tensors = [_own_tensor(leaf, where) for leaf in leaves]
        tensors = tensors if batched else [tensor[None] for tensor in tensors]
        forms = [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors]
        if self.packing is None:
            if forms != [(self.shape, self.dtype)]:
                raise DataError(
                    f"{where} has a target {_form_text(forms)}, others have {_form_text([(self.shape, self.dtype)])}; give all samples "
                    "targets of one form"
                )
            converted = tensors[0]
        else:
            expected = list(zip(self.packing.shapes, self.packing.dtypes, strict=True))
            if tree != self.packing.tree or forms != expected:
                raise DataError(
                    f"{where} has targets {_form_text(forms)}, others have {_form_text(expected)}; give all samples targets of one form"
                )
            converted = self.packing.pack(tensors)
        return converted if batched else converted[0]

    def joined(self, other: "Targets", where: str) -> "Targets":
        """Return the form of the targets of two parts of a data set together.

        Args:
            other: Form of the targets of another part.
            where: Names of the parts, for the message.

        Raises:
            DataError: They are of different kinds or shapes.
        """
        if (self.kind, self.shape, self.packing) != (other.kind, other.shape, other.packing):
            raise DataError(
                f"{where}: targets are {_kind_text(self)} in one part and {_kind_text(other)} in another; give both one form"
            )
        wider = max((self.dtype, other.dtype), key=lambda dtype: dtype.itemsize)
        return dataclasses.replace(self, num_classes=max(self.num_classes, other.num_classes), dtype=wider)


def find_targets(
    values: Any, where: str, options: TargetOptions, sample_shape: tuple[int, ...], *, tokens: bool, are_all: bool = True
) -> Targets:
    """Find out what targets are.

    Args:
        values: Targets (N, ...) of all samples, or of some of them: a tensor, an array, a list; where a loss of the user's own
            understands them also tuples and dictionaries of these.
        where: Name of the data in messages.
        options: What is known of them.
        sample_shape: Shape of one sample.
        tokens: Whether samples are tokens.
        are_all: Whether these are all of them, so that masks of small numbers may be kept as bytes.

    Raises:
        DataError: They are not of the task, or it is not clear what they are.

    Example:
        >>> find = lambda values, task="auto": find_targets(values, "mine", TargetOptions(task), (4,), tokens=False)
        >>> find([2, 0]).kind, find([0.5, 2.0]).kind, find([[1, 0, 1], [0, 1, 1]]).kind, find([[1, 0], [0, 1]], "multilabel").kind
        ('class', 'values', 'labels', 'labels')
    """
    task, ignored = options.task, options.ignored
    if isinstance(values, tuple) and not any(isinstance(value, Tensor | np.ndarray | dict | tuple) for value in values):
        values = list(values)
    if task == "own":
        return _own_targets(values, where)
    if isinstance(values, dict | tuple):
        raise DataError(
            f"{where}: a target is a {type(values).__name__} of several values; give a loss that takes it, loss=... from Python"
        )
    refuse_words(values, where)
    y = as_tensor(values, f"the labels of {where}")
    kind = _kind(y, where, task, sample_shape, tokens=tokens, ignored=ignored)
    if kind == "class":
        labels = as_labels(y, where)
        ignored = PYTORCH_IGNORED if ignored is None else ignored
        return Targets("class", _count(labels, ignored), ignored=ignored)
    if kind == "tokens":
        ignored = PYTORCH_IGNORED if ignored is None else ignored
        rows = max(1, _COUNTED_AT_ONCE // max(1, y[0].numel()))
        count = max(_count(y[begin : begin + rows].to(torch.int64), ignored) for begin in range(0, len(y), rows))
        return Targets("tokens", count, tuple(y.shape[1:]), ignored=ignored)
    if kind == "mask":
        ignored = MASK_IGNORED if ignored is None else ignored
        mask = _without_channel(y, where)
        # Bytes cannot hold, nor be compared with, a number that is left out and is none of theirs.
        small = 0 <= ignored < 256 and (mask.dtype == torch.uint8 or (are_all and fits_bytes(mask)))
        return Targets("mask", _count(mask, ignored), tuple(mask.shape[1:]), torch.uint8 if small else torch.int64, ignored)
    return Targets(kind, torch.Size(y.shape[1:]).numel(), tuple(y.shape[1:]), torch.float32)


def _kind(
    y: Tensor, where: str, task: TaskName, sample_shape: tuple[int, ...], *, tokens: bool, ignored: int | None
) -> TargetKind:
    """Return the kind of targets (N, ...), by the task, or by their shapes and values."""
    shape, floating = tuple(y.shape[1:]), y.dtype.is_floating_point
    one_each = shape in ((), (1,))
    of_tokens = tokens and shape == sample_shape and not floating and y[0].numel() > 1
    of_pixels = (
        not floating and len(sample_shape) == 3 and shape[-2:] in (sample_shape[-2:], sample_shape[:2]) and len(shape) in (2, 3)
    )
    if task == "regression":
        return "values"
    if task == "multilabel":
        if len(shape) != 1 or not bool(zeros_and_ones(y).all()):
            raise DataError(
                f"{where}: --task multilabel takes targets (N, labels) of 0 and 1, and these have shape {tuple(y.shape)}"
                f"{'' if bool(zeros_and_ones(y).all()) else f', with values up to {y.max().item():g}'}; give a column for each label"
            )
        return "labels"
    if task == "segmentation":
        if not of_pixels:
            raise DataError(
                f"{where}: --task segmentation takes a class number for each pixel, (N, {', '.join(map(str, sample_shape[-2:]))}) of integers, "
                f"and these targets are {tuple(y.shape)} {str(y.dtype).removeprefix('torch.')}; give such masks"
            )
        return "mask"
    if task == "classification":
        if of_tokens:
            return "tokens"
        return "probabilities" if len(shape) == 1 and not one_each and bool(probabilities(y).all()) else "class"
    if of_tokens:
        return "tokens"
    if of_pixels:
        return "mask"
    if one_each:
        return _kind_of_numbers(y, where, ignored) if floating else "class"
    if tokens:
        raise DataError(
            f"{where}: labels have shape {tuple(y.shape)}, and samples are integers of shape {sample_shape}; give one class number for each "
            "sample, or one for each token: integer samples and labels of one shape (N, T); or --task multilabel or regression"
        )
    if len(shape) == 1 and bool(probabilities(y).all()):
        what = "one-hot" if bool(zeros_and_ones(y).all()) else "probabilities"
        raise DataError(
            f"{where}: labels have shape {tuple(y.shape)}, with {what} rows; give one class number for each sample (one-hot: argmax), or "
            "say what they are: --task classification, multilabel or regression"
        )
    if len(shape) == 1 and bool(zeros_and_ones(y).all()):
        return "labels"
    if floating:
        return "values"
    hint = ", or, for tokens, samples as int32 or uint16 (uint8 is taken for images)" if shape == sample_shape else ""
    raise DataError(
        f"{where}: labels have shape {tuple(y.shape)}; give one class number for each sample (one-hot: argmax){hint}, or say what they are: "
        "--task regression"
    )


def _kind_of_numbers(y: Tensor, where: str, ignored: int | None) -> TargetKind:
    """Return what one float for each sample is: class numbers are whole, from 0, and not too many."""
    if not bool(torch.isfinite(y).all()) or bool((y != y.trunc()).any()):
        return "values"
    counted = y if ignored is None else y[y != ignored]
    if counted.numel() and float(counted.max()) >= _MOST_CLASSES_OF_FLOATS:
        raise DataError(
            f"{where}: targets are whole floats up to {counted.max().item():g}, which may be values or class numbers; say which: --task "
            "regression or --task classification"
        )
    return "values" if counted.numel() and float(counted.min()) < 0 else "class"


def _own_targets(values: Any, where: str) -> Targets:
    one = isinstance(values, list) or not isinstance(values, dict | tuple)
    leaves, tree = pytree.tree_flatten([values] if one else values)
    leaves = [values] if one else leaves
    tensors = [_own_tensor(leaf, where) for leaf in leaves]
    if not tensors:
        raise DataError(f"{where} has targets without a tensor; give at least one")
    shapes, dtypes = tuple(tuple(tensor.shape[1:]) for tensor in tensors), tuple(tensor.dtype for tensor in tensors)
    if one:
        (y,) = tensors
        classes = y.dtype == torch.int64 and y.numel() and not y.shape[1:] and int(y.min()) >= 0
        count = int(y.max()) + 1 if classes else torch.Size(shapes[0]).numel()
        return Targets("own", count, shapes[0], dtypes[0])
    packing = Packing(tree, shapes, dtypes)
    return Targets("own", 0, (sum(packing.sizes),), torch.uint8, packing=packing)


def _own_tensor(value: Any, where: str) -> Tensor:
    tensor = as_tensor(value, f"the targets of {where}", palette=True)
    if tensor.dtype.is_floating_point:
        return tensor.to(torch.float32)
    return tensor if tensor.dtype in (torch.bool, torch.uint8) else tensor.to(torch.int64)


def _without_channel(mask: Tensor, where: str) -> Tensor:
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.dtype.is_floating_point or mask.ndim != 3:
        raise DataError(
            f"{where}: a mask is {tuple(mask.shape[1:])} {mask.dtype}; give class numbers (height, width) as integers"
        )
    return mask.long() if mask.dtype in FEW_OPERATIONS else mask


def _count(labels: Tensor, ignored: int | None) -> int:
    if ignored is not None and labels.dtype == torch.uint8 and not 0 <= ignored < 256:
        ignored = None  # compared with bytes it would be another number
    counted = labels if ignored is None else labels[labels != ignored]
    return max(int(counted.max()) if counted.numel() else 0, 0) + 1


def _form_text(forms: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{shape} {str(dtype).removeprefix('torch.')}" for shape, dtype in forms)


def _kind_text(targets: Targets) -> str:
    kinds = ("class numbers", "class numbers of tokens", "masks", "0 and 1", "numbers")
    words = dict(zip(("class", "tokens", "mask", "labels", "values"), kinds, strict=True))
    return f"{words.get(targets.kind, targets.kind)}{f' of shape {targets.shape}' if targets.shape else ''}"

"""A data set: its training, validation and test parts as a model takes them, held against each other."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from lowmem_pnn.errors import DataError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.imports import did_you_mean
from lowmem_pnn.sources.splits import ArraySplit, SampleSplit, Split
from lowmem_pnn.sources.subsets import as_floats
from lowmem_pnn.sources.targets import TargetKind, TargetOptions, Targets, TaskName

# Names of broken samples that reports hold: of a data set of millions all could be broken.
_MOST_NAMES = 100

TASK_OF: dict[TargetKind, TaskName] = {
    "class": "classification", "tokens": "classification", "probabilities": "classification", "labels": "multilabel",
    "values": "regression", "mask": "segmentation", "own": "own",
}  # fmt: skip
"""Task of each kind of targets."""

FRAME_COLUMNS = "frame_columns"
"""What `Dataset.preparation` calls the names of the columns of a table of numbers that was given whole."""


def options_like(targets: Targets, options: TargetOptions) -> TargetOptions:
    """Return what is known of the targets of other data once those of the training data are: a few of them need not show what they are.

    Args:
        targets: Form of the training data's targets.
        options: What was known of these.
    """
    return dataclasses.replace(options, task=TASK_OF[targets.kind])


@dataclass(frozen=True)
class Dataset:
    """Samples to train on, to validate on and to test with, as a model takes them.

    Args:
        name: Name for run folders and results: letters, digits, '-', '_' and '.' only.
        train: Training part, of at least one sample.
        test: Test part; None if there is none.
        targets: Form of the targets: what is to be predicted of a sample.
        sample_shape: Shape of one sample, without the batch axis.
        dtype: Element type of the samples: float32, or int64 for tokens.
        preprocessing: Steps from the raw samples to these, in words, so that anyone can do them again.
        fingerprint: Hash that changes when the data does.
        val: Validation part; None if there is none, so that some of the training part is taken.
        skipped: Broken samples that were left out, by name, with what is wrong with each.
        classes: Names of the classes, in the order of their numbers; empty where they have none.
        inputs: Tensors of one sample, where it is several.
        structure: Structure of these: a tuple or a dictionary; None where a sample is one tensor.
        is_random: Whether a training sample is another one whenever it is drawn anew, since the data set has random transforms.
        notes: What is said of samples that are other ones than the source gives, a line each.
        sampler: Draws the training samples of an epoch (`lowmem_pnn.samples.epochs.EpochSampler`); None where each comes once.
        decoding_bytes: Most memory that reading a sample takes for a moment, beside the sample itself: that of an image before it is resized.
        parts: The samples of each part in words, and which parts were split off; empty before that.
        preparation: What samples were made with that follows from the training data, as JSON has it: columns, classes, statistics.
    """

    name: str
    train: Split
    test: Split | None
    targets: Targets
    sample_shape: tuple[int, ...]
    dtype: torch.dtype
    preprocessing: str
    fingerprint: str
    val: Split | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    decoding_bytes: int = 0
    parts: str = ""
    preparation: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[TensorSpec, ...] = ()
    structure: TreeSpec | None = None
    is_random: bool = False
    notes: tuple[str, ...] = ()
    sampler: Any = None

    @property
    def num_classes(self) -> int:
        """Number of classes, from 0; see `Targets`."""
        return self.targets.num_classes

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of one sample's target: () for one class number."""
        return self.targets.shape

    @property
    def skipped_samples(self) -> dict[str, Any]:
        """The `count` of the samples that were left out, and the `names` of the first 100."""
        return {"count": len(self.skipped), "names": list(self.skipped)[:_MOST_NAMES]}

    @property
    def may_be_numbers(self) -> bool:
        """Whether integer samples may be numbers to calculate with as well as tokens: nothing but the model tells."""
        parts = [part for part in (self.train, self.val, self.test) if part is not None]
        return (
            self.dtype == torch.int64 and self.targets.kind != "tokens" and all(isinstance(part, SampleSplit) for part in parts)
        )

    def as_floats(self) -> "Dataset":
        """Return the same data set with integer samples as float32; see `may_be_numbers`."""
        assert isinstance(self.train, SampleSplit)
        train, val, test = (None if part is None else as_floats(part) for part in (self.train, self.val, self.test))
        assert isinstance(train, SampleSplit)
        steps = ", ".join(train.preprocessing.all_steps)
        return dataclasses.replace(self, train=train, val=val, test=test, dtype=torch.float32, preprocessing=steps)


def join_parts(
    name: str,
    train: SampleSplit,
    test: SampleSplit | None,
    val: SampleSplit | None = None,
    *,
    first_steps: tuple[str, ...] | None = None,
    skipped: Mapping[str, str] | None = None,
    classes: tuple[str, ...] = (),
) -> Dataset:
    """Put the parts of a data set together.

    Args:
        name: Name of the data set; any text.
        train: Training part.
        test: Test part; None if there is none.
        val: Validation part; None if there is none.
        first_steps: Words for the first step of the preprocessing, where the source did something itself.
        skipped: Broken samples that the source left out itself, by name; those of the parts are added.
        classes: Names of the classes, in the order of their numbers, where they have names.

    Raises:
        DataError: The parts do not fit together, or a sample or label of arrays is not usable.
    """
    preprocessing = train.preprocessing
    others = [(part, kind) for part, kind in ((val, "validation"), (test, "test")) if part is not None]
    for part, kind in others:
        _check_fit(name, train, part, kind)
    parts = [train, *(part for part, _ in others)]
    targets = train.targets
    for part, kind in others:
        targets = targets.joined(part.targets, f"data set {name!r}, training and {kind} part")
    for part in parts:
        part.targets = targets
        if isinstance(part, ArraySplit):
            part.check()
    if not classes and targets.kind == "class" and len(train.classes) == targets.num_classes:
        classes = train.classes
    steps = preprocessing.steps_after(first_steps or preprocessing.steps[:1])
    fingerprints = [part.fingerprint() for part in (train, test) if part is not None]
    if val is not None:
        fingerprints.append(f"validation {val.fingerprint()}")
    return Dataset(
        name=folder_name(name),
        train=train,
        test=test,
        val=val,
        targets=targets,
        inputs=train.inputs if train.structure is not None else (),
        structure=train.structure,
        is_random=train.is_random,
        sample_shape=preprocessing.shape,
        dtype=preprocessing.dtype,
        preprocessing=", ".join(steps),
        fingerprint=hashlib.sha256("\n".join([*fingerprints, *steps]).encode()).hexdigest(),
        skipped={name: reason for known in (skipped or {}, *(part.skipped for part in parts)) for name, reason in known.items()},
        classes=classes,
        preparation={FRAME_COLUMNS: list(train.columns)} if train.columns else {},
    )


def check_columns(what: str, columns: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a table whose columns are others than those of the training data, or stand in another order.

    Args:
        what: Name of the table in messages.
        columns: Names of its columns; empty where they have none.
        known: The same of the training data.

    Raises:
        DataError: One is another.
    """
    for number, (own, other) in enumerate(zip(columns, known, strict=False), start=1):
        if own != other:
            raise DataError(
                f"{what}: column {number} is {own!r}, and {other!r} in the training data; give its columns, in the same order"
            )


def _check_fit(name: str, train: SampleSplit, part: SampleSplit, kind: str) -> None:
    """Refuse a part whose samples or labels are of another form than those of the training part."""
    own, other = train.preprocessing, part.preprocessing
    if (train.structure, train.inputs) != (part.structure, part.inputs) and (train.structure or part.structure) is not None:
        raise DataError(f"data set {name!r}: training and {kind} samples hold different tensors; give both the same")
    if (other.shape, other.dtype) != (own.shape, own.dtype):
        raise DataError(
            f"data set {name!r}: training samples are {own.shape} {own.dtype}, {kind} samples {other.shape} {other.dtype}; give both "
            "one shape and dtype"
        )
    check_columns(f"data set {name!r}, {kind} part", part.columns, train.columns)
    for number, names in enumerate(zip(train.classes, part.classes, strict=False)):
        if names[0] != names[1]:
            raise DataError(
                f"data set {name!r}: class {number} is {names[0]!r} in the training part and {names[1]!r} in the {kind} part; number the "
                "classes alike (of folders: as many, of the same names)"
            )
    kinds = [(steps.raw_dtype == torch.uint8, steps.steps[1:]) for steps in (own, other)]
    if kinds[0] != kinds[1]:
        raise DataError(
            f"data set {name!r}: training samples are presented as {', '.join(own.steps)}, {kind} samples as "
            f"{', '.join(other.steps)}; store both alike"
        )
    if train.label_shape != part.label_shape:
        raise DataError(
            f"data set {name!r}: a training sample's labels have shape {train.label_shape}, a {kind} sample's {part.label_shape}; "
            "give both one shape"
        )
    types = [str(one.targets.dtype).removeprefix("torch.") for one in (train, part) if one.targets.kind == "own"]
    if len(set(types)) > 1:
        raise DataError(
            f"data set {name!r}: targets are {types[0]} in training and {types[1]} in the {kind} part; give both one type"
        )


def class_numbers(what: str, other: tuple[Sequence[str], Targets], own: tuple[Sequence[str], Targets]) -> Tensor | None:
    """Return the number that the training data gives to each class of other data, by their names where both have names.

    Args:
        what: Name of the other data in messages.
        other: Names of its classes, if they have names, and the form of its targets.
        own: The same of the training data.

    Returns:
        Numbers (classes,); None where classes are numbered alike.

    Raises:
        DataError: There is a class that the training data has not.
    """
    (names, targets), (known, trained) = other, own
    if not names or not known or targets.kind != "class":
        if targets.num_classes > trained.num_classes:
            raise DataError(
                f"{what} has classes up to number {targets.num_classes - 1}, and the training data up to {trained.num_classes - 1}; number "
                "the classes alike, and leave out what is not trained on"
            )
        return None
    if unknown := [name for name in names if name not in known]:
        raise DataError(
            f"{what} has the class {unknown[0]!r}, which the training data has not{did_you_mean(unknown[0], list(known))}; give both the "
            "same names of classes"
        )
    numbers = [list(known).index(name) for name in names]
    return None if numbers == list(range(len(numbers))) else torch.tensor(numbers)


def folder_name(text: str) -> str:
    """Return a text as part of a folder's name: letters, digits, '-', '_' and '.' alone.

    Args:
        text: Any text.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60] or "data"

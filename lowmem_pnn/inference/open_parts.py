"""Open parts of the data that a trained model predicts, held against the form of the data that it was trained on."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from lowmem_pnn.errors import DataError
from lowmem_pnn.language.sequence_rows import LabelledRows
from lowmem_pnn.language.token_rows import choose_inputs
from lowmem_pnn.samples.normalization import Normalization
from lowmem_pnn.sources.dataset import Dataset, class_numbers
from lowmem_pnn.sources.splits import Indices, SampleSplit, Split
from lowmem_pnn.sources.subsets import RenumberedSplit, as_floats, files_of, places_of, whole_of
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.workload.data_form import DataForm

_Tensors = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class OpenPart:
    """One part of some data.

    Args:
        split: Its samples, as the source gives them.
        labelled: Whether they have targets.
        inputs: Shape and type of each tensor of a sample.
        structure: Structure of these; None where a sample is one tensor.
        targets: Form of the targets, where there are such.
        classes: Names of the classes, by their numbers; empty where they have none.
        skipped: Broken samples that were left out, by name, with what is wrong with each.
        notes: What is said of samples that are other ones than the source gives, a line each.
    """

    split: Split
    labelled: bool
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    structure: TreeSpec | None
    targets: Targets
    classes: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of_split(cls, split: SampleSplit, labelled: bool) -> "OpenPart":
        """Return a part that the package reads itself."""
        inputs = tuple((spec.shape, spec.dtype) for spec in split.inputs)
        return cls(split, labelled, inputs, split.structure, split.targets, split.classes, split.skipped, split.notes)

    @classmethod
    def of_dataset(cls, split: Split, dataset: Dataset) -> "OpenPart":
        """Return a part of a data set, with targets but for texts that have no classes."""
        several = tuple((spec.shape, spec.dtype) for spec in dataset.inputs)
        inputs = several if dataset.structure is not None else ((dataset.sample_shape, dataset.dtype),)
        rows = whole_of(split)
        labelled = rows.has_labels if isinstance(rows, LabelledRows) else True
        skipped, notes = dataset.skipped, dataset.notes
        return cls(split, labelled, inputs, dataset.structure, dataset.targets, tuple(dataset.classes), skipped, notes)


class SamplesToPredict:
    """Split of the samples that are predicted, in the order of their parts.

    Args:
        parts: Parts of the data.
        form: Form of the samples that the run was trained on.
        normalization: Normalises them, by the statistics of the run; None to leave values as they are.
        name: Name of the data in messages.
        root: Folder of the data, where samples are files.
        scored: Whether answers are measured, by targets of any form.

    Raises:
        DataError: They are of another form.
    """

    def __init__(
        self,
        parts: Sequence[OpenPart],
        form: DataForm,
        normalization: Normalization | None,
        name: str,
        root: Path | None,
        scored: bool = False,
    ) -> None:
        parts = [_fitted(_as_taken(part, form), form, name) for part in parts]
        self._normalization, self._root = normalization, root
        floats = form.structure is None and form.inputs[0].dtype == torch.float32
        self._parts = [as_floats(part.split) if floats and part.inputs[0][1] == torch.int64 else part.split for part in parts]
        self._begins = np.cumsum([0, *(len(part.split) for part in parts)])
        self.skipped = {name: reason for part in parts for name, reason in part.skipped.items()}
        """Broken samples that were left out, by name, with what is wrong with each."""
        self.notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
        """What is said of samples that are other ones than the source gives, a line each."""
        own = form.targets.kind == "own"
        first = parts[0].targets
        self.labelled = all(part.labelled for part in parts) and (scored or not (own and first.packing is not None))
        """Whether the samples have targets, of one tensor each unless they are for scores."""
        self.targets = first if own and self.labelled else form.targets
        """Form of the targets that come with them; zeros where there are none."""
        if self.labelled and form.targets.kind == "mask":
            # Bytes, in which masks of the training data were kept, need not hold others.
            widest = max((form.targets.dtype, *(part.targets.dtype for part in parts)), key=lambda dtype: dtype.itemsize)
            self.targets = dataclasses.replace(form.targets, dtype=widest)
        self.num_classes = max(part.targets.num_classes for part in parts)
        """Number of classes that targets show, and tokens where each has a label."""

    @property
    def base(self) -> Split:
        """The first part, of the same source as the others."""
        return self._parts[0]

    def __len__(self) -> int:
        return int(self._begins[-1])

    def batch(self, indices: Indices) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Return samples and targets, as `Split.batch` does."""
        numbers = np.asarray(indices, dtype=np.int64)
        pieces = [split.batch(own) for split, own in self._by_part(numbers)]
        samples, targets = _join([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
        if self._normalization is not None and isinstance(samples, Tensor):
            samples = self._normalization(samples)
        return samples, targets.to(self.targets.dtype) if self.labelled else self.targets.zeros(len(numbers))

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """Place of each sample in its part, from 0, which broken samples that were left out have too; of several parts one after another."""
        found, begin = [], 0
        for split in self._parts:
            own = places_of(split)
            found.append(own + begin)
            begin += max(len(split), int(own[-1]) + 1)
        return np.concatenate(found)

    def files(self, numbers: npt.NDArray[np.int64]) -> list[str] | None:
        """Return the files of samples, by their places below the data's folder; None where samples are no files.

        Args:
            numbers: Numbers of samples, in ascending order.
        """
        found: list[str] = []
        for split, own in self._by_part(numbers):
            paths = files_of(split, own)
            if paths is None:
                return None
            found += [str(self._below_root(path)) for path in paths]
        return found

    def _below_root(self, path: Path) -> Path:
        return path.relative_to(self._root) if self._root is not None and path.is_relative_to(self._root) else path

    def _by_part(self, numbers: npt.NDArray[np.int64]) -> list[tuple[Split, npt.NDArray[np.int64]]]:
        """Return the parts that ascending numbers of samples are of, each with its own numbers."""
        homes = np.searchsorted(self._begins, numbers, side="right") - 1
        return [(self._parts[home], numbers[homes == home] - self._begins[home]) for home in np.unique(homes)]


def _as_taken(part: OpenPart, form: DataForm) -> OpenPart:
    """Return samples with those of their named tensors that the run's model takes: token rows come with all there are."""
    if (chosen := choose_inputs(part.split, part.structure, form.structure)) is None:
        return part
    inputs = tuple(part.inputs[place] for place in chosen[1])
    return dataclasses.replace(part, split=chosen[0], inputs=inputs, structure=form.structure)


def _fitted(part: OpenPart, form: DataForm, name: str) -> OpenPart:
    """Return a part with the class numbers of the run; refuse samples, or targets, of another form than it was trained on."""
    wanted = tuple((spec.shape, spec.dtype) for spec in form.inputs)
    numbers = (
        len(part.inputs) == len(wanted) == 1 and part.inputs[0] == (wanted[0][0], torch.int64) and wanted[0][1] == torch.float32
    )
    if part.structure != form.structure or (part.inputs != wanted and not numbers):
        found = " and ".join(f"{shape} {str(dtype).removeprefix('torch.')}" for shape, dtype in part.inputs)
        hint = "; give data of one form"
        if len(part.inputs) == 1 and len(part.inputs[0][0]) == len(wanted[0][0]) == 3:
            hint = f"; bring images to {wanted[0][0][-2]} x {wanted[0][0][-1]} (rows x columns)"
        elif part.structure == form.structure and (length := _other_length(part.inputs, wanted)) is not None:
            hint = f"; have collate_fn, or the tokenizer, bring them to {length} (padding='max_length', max_length={length}, truncation=True)"
            hint += ", or give them to fit (test=), which pads all parts alike"
        raise DataError(f"{name} has samples of shape {found}, and the run was trained on samples of shape {form}{hint}")
    own, targets = form.targets, part.targets
    if part.labelled and own.kind != "own" and (own.kind, own.shape) != (targets.kind, targets.shape):
        raise DataError(
            f"{name} has targets of shape {targets.shape} ({targets.kind}), and the run was trained on {own.shape} ({own.kind}); give such "
            "targets, or samples alone"
        )
    if not part.labelled or own.kind not in ("class", "mask"):
        return part  # of tokens the model may know more than the training data showed
    renumbered = class_numbers(name, (part.classes, targets), (form.classes, own))
    return part if renumbered is None else dataclasses.replace(part, split=RenumberedSplit(part.split, renumbered))


def _other_length(found: Sequence[_Tensors], wanted: Sequence[_Tensors]) -> int | None:
    """Return the length that sequences should have; None where these are none, or differ in more than their length."""
    if [(len(shape), dtype) for shape, dtype in found] != [(len(shape), dtype) for shape, dtype in wanted]:
        return None
    pairs = [(shape, own) for (shape, _), (own, _) in zip(found, wanted, strict=True) if shape != own]
    # A sample of floats is a sequence where each of its elements is several numbers.
    are_sequences = any(not dtype.is_floating_point for _, dtype in found) or all(len(own) > 1 for _, own in pairs)
    if not are_sequences or any(shape[1:] != own[1:] for shape, own in pairs):
        return None
    lengths = {own[0] for _, own in pairs}
    return lengths.pop() if len(lengths) == 1 else None


def _join(pieces: Sequence[Tensor | tuple[Tensor, ...]]) -> Tensor | tuple[Tensor, ...]:
    if isinstance(first := pieces[0], tuple):
        return tuple(torch.cat([piece[place] for piece in pieces]) for place in range(len(first)))
    return pieces[0] if len(pieces) == 1 else torch.cat([piece for piece in pieces if isinstance(piece, Tensor)])

"""Samples to predict: the run's own data or any other, with targets or without, as the run has shown samples to its model."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from lowmem_pnn.config.code import names_code
from lowmem_pnn.config.configure import DOWNLOADED, given_options
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.language_options import LANGUAGE_KINDS, ROWS_OF_TEXT
from lowmem_pnn.errors import ConfigError, DataError, LowMemError
from lowmem_pnn.formats.data_frame import DataFrame, as_frame
from lowmem_pnn.formats.hub_data import open_hub_samples
from lowmem_pnn.formats.mask_folder import has_masks, open_mask_folder
from lowmem_pnn.formats.table_file import TableFile
from lowmem_pnn.formats.tables import TableSchema, open_table
from lowmem_pnn.formats.unlabelled import open_given, open_images, open_npz
from lowmem_pnn.language.token_rows import choose_inputs
from lowmem_pnn.samples.normalization import Normalization
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.sources.datasets import find_dataset
from lowmem_pnn.sources.given import as_pair, without_bunch
from lowmem_pnn.sources.imports import load_factory, one_line
from lowmem_pnn.sources.splits import Indices, SampleSplit, Split
from lowmem_pnn.sources.subsets import as_floats, files_of
from lowmem_pnn.sources.targets import TargetOptions, Targets
from lowmem_pnn.workload.data_form import DataForm
from lowmem_pnn.workload.parts import open_apart, split_data
from lowmem_pnn.workload.sources import SampleForm, open_source, resize_of
from lowmem_pnn.zoo.model_source import ModelSource

_Parts = tuple[dict[str, "OpenPart"], str]
PartName = Literal["train", "val", "test", "all"]
"""Part of the data that is predicted."""

_WORDS = {"train": "training", "val": "validation", "test": "test"}
_FILES = {
    "imagefolder": "DIR", "segmentation": "DIR", "hfdata": "DIR", "npz": "FILE", "csv": "FILE", "parquet": "FILE", "text": "FILE",
}  # fmt: skip
_SUFFIXES = {".npz": "npz", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".jsonl": "jsonl"}


@dataclass(frozen=True)
class OpenPart:
    """One part of some data.

    Args:
        split: Its samples, as the source gives them.
        labelled: Whether they have targets.
        inputs: Shape and type of each tensor of a sample.
        structure: Structure of these; None where a sample is one tensor.
        targets: Form of the targets, where there are such.
    """

    split: Split
    labelled: bool
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    structure: TreeSpec | None
    targets: Targets

    @classmethod
    def of_split(cls, split: SampleSplit, labelled: bool) -> "OpenPart":
        """Return a part that the package reads itself."""
        inputs = tuple((spec.shape, spec.dtype) for spec in split.inputs)
        return cls(split, labelled, inputs, split.structure, split.targets)

    @classmethod
    def of_dataset(cls, split: Split, dataset: Dataset) -> "OpenPart":
        """Return a part of a data set with targets."""
        several = tuple((spec.shape, spec.dtype) for spec in dataset.inputs)
        inputs = several if dataset.structure is not None else ((dataset.sample_shape, dataset.dtype),)
        # Texts that are to be classified say which column their classes are of: none where they have none.
        labelled = dataset.preparation.get("target", "") is not None
        return cls(split, labelled, inputs, dataset.structure, dataset.targets)


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
        parts = [_as_taken(part, form) for part in parts]
        for part in parts:
            _check_form(part, form, name)
        self._normalization, self._root = normalization, root
        floats = form.structure is None and form.inputs[0].dtype == torch.float32
        self._parts = [as_floats(part.split) if floats and part.inputs[0][1] == torch.int64 else part.split for part in parts]
        self._begins = np.cumsum([0, *(len(part.split) for part in parts)])
        own = form.targets.kind == "own"
        first = parts[0].targets
        self.labelled = all(part.labelled for part in parts) and (scored or not (own and first.packing is not None))
        """Whether the samples have targets, of one tensor each unless they are for scores."""
        self.targets = first if own and self.labelled else form.targets
        """Form of the targets that come with them; zeros where there are none."""

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


@dataclass(frozen=True)
class Opened:
    """Samples to predict, and what people are told of them.

    Args:
        split: The samples.
        words: How many they are, and of which data.
        preprocessing: The steps to them in words, up to what follows from the training data.
    """

    split: SamplesToPredict
    words: str
    preprocessing: str


def open_samples(
    data: Any,
    part: PartName | None,
    config: FitConfig,
    form: DataForm,
    source: ModelSource,
    preparation: Mapping[str, Any],
    options: TargetOptions,
    *,
    skip_broken: bool = False,
    scored: bool = False,
) -> Opened:
    """Open the samples that are to be predicted.

    Args:
        data: Data set by name, folder or file; objects as Python gives them; None for the run's own data.
        part: Part of it; None for the test part, or all of a source that has none.
        config: Options of the run.
        form: Form of the samples that it was trained on.
        source: Constructor of its model.
        preparation: What its samples were made with.
        options: What is known of the targets.
        skip_broken: Leave out samples that cannot be used, instead of raising.
        scored: Whether answers are measured by targets, instead of being given back.

    Raises:
        ConfigError: There is no such data.
        DataError: It has no such part, or cannot be read, or is of another form than the run's.
    """
    text = isinstance(data, str | Path)
    spec = _spec(str(data), form) if text else config.data
    parts: dict[str, OpenPart] = {}
    steps, root = "", None
    sample_form = SampleForm.of(source, options, may_lack_labels=not scored)
    if skip_broken and (text or data is None) and (spec in ("digits", *DOWNLOADED) or _is_text(spec, preparation)):
        what = "is text" if _is_text(spec, preparation) else "has no broken samples"
        raise ConfigError(f"--skip-broken has no effect here: data {spec} {what}; leave it out")
    if data is None or (text and spec == config.data):
        if config.data.startswith("python:"):
            raise ConfigError(
                f"the run was trained on data from Python ({config.data}), which no name leads to; give the data to predict"
            )
        own = dataclasses.replace(config, skip_broken=config.skip_broken or skip_broken)
        parts, steps = _own_parts(own, sample_form)
        root = _root(spec)
    elif text:
        (parts, steps), root = _parts_of(spec, config, form, sample_form, preparation, skip_broken), _root(spec)
    else:
        spec, data = f"python:{type(data).__name__}", without_bunch(data)
        frame = as_frame(data, spec, preparation["targets"]) if "columns" in preparation else None
        if frame is not None:
            parts, steps = _of_table(frame, sample_form, preparation, skip_broken)
    if not parts:
        split, labelled = open_given(
            data, spec, source.input_form, form.structure, options, skip_broken=skip_broken, resize=resize_of(config)
        )
        parts, steps = {"all": OpenPart.of_split(split, labelled)}, ", ".join(split.preprocessing.all_steps)
    name, chosen = _choose(parts, part, spec)
    mean, std = (tuple(preparation.get(statistic, ())) for statistic in ("mean", "std"))
    normalization = Normalization(mean, std, "") if mean else None
    samples = SamplesToPredict(chosen, form, normalization, f"data {spec}", root, scored)
    words = f"{len(samples):,} sample{'' if len(samples) == 1 else 's'}{f', the {_WORDS[name]} part' if name in _WORDS else ''} of {spec}"
    return Opened(samples, words, steps)


def _spec(text: str, form: DataForm) -> str:
    """Return the name of data in full; of a file or a folder its kind is told from its name, and from what the model predicts."""
    path = Path(text).expanduser()
    if path.is_dir():
        text = f"{'segmentation' if form.targets.kind == 'mask' else 'imagefolder'}:{text}"
    elif path.is_file():
        text = f"{_SUFFIXES.get(path.suffix.lower(), 'imagefolder')}:{text}"
    return str(given_options({"data": text})["data"])


def _is_text(spec: str, preparation: Mapping[str, Any]) -> bool:
    """Return whether data is text or tokens, by its kind, or by how the run read such rows."""
    kind = spec.partition(":")[0]
    return kind in LANGUAGE_KINDS or (kind in ROWS_OF_TEXT and "tokenizer" in preparation)


def _root(spec: str) -> Path | None:
    kind, _, place = spec.partition(":")
    path = Path(place).parent if Path(place).is_file() else Path(place)
    return path if kind in ("imagefolder", "segmentation") else None


def _own_parts(config: FitConfig, form: SampleForm) -> tuple[dict[str, OpenPart], str]:
    """Return the parts of the run's own data, as it was divided for training."""
    dataset = open_source(config.data, config, form)
    dataset, apart = open_apart(config, dataset, form)
    dataset, splits = split_data(dataset, config, apart)
    return {name: OpenPart.of_dataset(split, dataset) for name, split in splits.items()}, dataset.preprocessing


def _parts_of(
    spec: str,
    config: FitConfig,
    form: DataForm,
    sample_form: SampleForm,
    preparation: Mapping[str, Any],
    skip_broken: bool,
) -> tuple[dict[str, OpenPart], str]:
    """Return the parts of data that is not the run's, and the steps to its samples."""
    kind, _, place = spec.partition(":")
    path, resize, options, input_form = Path(place), resize_of(config), sample_form.options, sample_form.input_form
    if kind in _FILES and not place:
        raise ConfigError(f"data {spec!r} says no place; write {kind}:{_FILES[kind]}")
    if kind == "segmentation" and has_masks(path):
        dataset = open_mask_folder(path, input_form, options, skip_broken=skip_broken, resize=resize)
        return _of_dataset(dataset), dataset.preprocessing
    if kind in ("imagefolder", "segmentation"):
        classes = form.classes if form.targets.kind == "class" else ()
        splits, steps = open_images(path, input_form, classes, skip_broken=skip_broken, resize=resize)
        return {name: OpenPart.of_split(*one) for name, one in splits.items()}, steps
    if _is_text(spec, preparation):
        dataset = open_source(spec, config, sample_form, preparation)
        return _of_dataset(dataset), dataset.preprocessing
    if kind in ("csv", "parquet"):
        if "columns" not in preparation:
            raise DataError(
                f"data {spec} is a table, and the run was trained on {config.data}, which is none; give data of one kind"
            )
        return _of_table(TableFile(path, kind), sample_form, preparation, skip_broken)  # type: ignore[arg-type]
    if kind == "npz":
        splits = open_npz(path, input_form, options, skip_broken=skip_broken, resize=resize)
    elif kind == "hfdata":
        splits = open_hub_samples(place, config.target, input_form, options, skip_broken=skip_broken, resize=resize)
    elif names_code("data", spec):
        found = _call(spec)
        if isinstance(found, Dataset):
            if skip_broken:
                raise ConfigError(
                    f"--skip-broken has no effect here: {spec!r} returns a Dataset that is made already; leave it out"
                )
            return _of_dataset(found), found.preprocessing
        two = isinstance(found, tuple) and len(found) == 2 and as_pair(found) is None and form.structure is None
        given = {"train": found[0], "test": found[1]} if two and found[1] is not None else {"all": found[0] if two else found}
        splits = {
            name: open_given(one, f"data {spec}", input_form, form.structure, options, skip_broken=skip_broken, resize=resize)
            for name, one in given.items()
        }
    else:
        dataset = find_dataset(spec, config.data_root, input_form, context=sample_form.context, options=options, resize=resize)
        return _of_dataset(dataset), dataset.preprocessing
    first = next(iter(splits.values()))[0]
    return {name: OpenPart.of_split(*one) for name, one in splits.items()}, ", ".join(first.preprocessing.all_steps)


def _of_table(file: TableFile | DataFrame, form: SampleForm, preparation: Mapping[str, Any], skip_broken: bool) -> _Parts:
    """Return the one part of a table, which may lack its targets, and the steps to its samples."""
    known, forms = TableSchema.from_dict(preparation), (form.input_form, form.options)
    table = open_table(file, None, *forms, skip_broken=skip_broken, schema=known, may_lack_targets=True)
    whole = OpenPart.of_dataset(table.train, table)
    return {"all": dataclasses.replace(whole, labelled=bool(table.preparation["targets"]))}, table.preprocessing


def _call(spec: str) -> Any:
    """Return what a user's function gives as data."""
    factory = load_factory(spec)
    try:
        return factory()
    except (LowMemError, MemoryError):
        raise
    # Whatever a user's function raises is the user's to see, on one line, with the original as the cause.
    except Exception as error:
        raise DataError(f"data {spec!r} cannot be opened: {one_line(error)}; see to the function") from error


def _of_dataset(dataset: Dataset) -> dict[str, OpenPart]:
    """Return the parts of a data set with targets; `all` of one without parts."""
    if dataset.val is None and dataset.test is None:
        return {"all": OpenPart.of_dataset(dataset.train, dataset)}
    parts = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return {name: OpenPart.of_dataset(split, dataset) for name, split in parts.items() if split is not None}


def _choose(parts: Mapping[str, OpenPart], part: PartName | None, spec: str) -> tuple[str, list[OpenPart]]:
    """Return the parts that are asked for, and what they are together."""
    name = part or ("test" if "test" in parts else "all")
    if name == "all":
        return name, list(parts.values())
    if name not in parts:
        there = " and ".join(f"a {_WORDS[one]}" for one in parts if one in _WORDS)
        has = f"has {there} part, and no {_WORDS[name]} part; give --part all" if there else "has no parts; leave --part out"
        raise DataError(f"--part {name}: data {spec} {has}")
    return name, [parts[name]]


def _as_taken(part: OpenPart, form: DataForm) -> OpenPart:
    """Return samples with those of their named tensors that the run's model takes: token rows come with all there are."""
    if (chosen := choose_inputs(part.split, part.structure, form.structure)) is None:
        return part
    inputs = tuple(part.inputs[place] for place in chosen[1])
    return dataclasses.replace(part, split=chosen[0], inputs=inputs, structure=form.structure)


def _check_form(part: OpenPart, form: DataForm, name: str) -> None:
    """Refuse samples, or targets, of another form than those that the run was trained on."""
    wanted = tuple((spec.shape, spec.dtype) for spec in form.inputs)
    numbers = (
        len(part.inputs) == len(wanted) == 1 and part.inputs[0] == (wanted[0][0], torch.int64) and wanted[0][1] == torch.float32
    )
    if part.structure != form.structure or (part.inputs != wanted and not numbers):
        found = " and ".join(f"{shape} {str(dtype).removeprefix('torch.')}" for shape, dtype in part.inputs)
        hint = "; give data of one form"
        if len(part.inputs) == 1 and len(part.inputs[0][0]) == len(wanted[0][0]) == 3:
            hint = f"; bring images to {wanted[0][0][-2]} x {wanted[0][0][-1]} (rows x columns)"
        raise DataError(f"{name} has samples of shape {found}, and the run was trained on samples of shape {form}{hint}")
    own, targets = form.targets, part.targets
    if part.labelled and own.kind != "own" and (own.kind, own.shape) != (targets.kind, targets.shape):
        raise DataError(
            f"{name} has targets of shape {targets.shape} ({targets.kind}), and the run was trained on {own.shape} ({own.kind}); give such "
            "targets, or samples alone"
        )


def _join(pieces: Sequence[Tensor | tuple[Tensor, ...]]) -> Tensor | tuple[Tensor, ...]:
    if isinstance(first := pieces[0], tuple):
        return tuple(torch.cat([piece[place] for piece in pieces]) for place in range(len(first)))
    return pieces[0] if len(pieces) == 1 else torch.cat([piece for piece in pieces if isinstance(piece, Tensor)])

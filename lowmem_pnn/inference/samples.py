"""Samples to predict: the run's own data or any other, with targets or without, as the run has shown samples to its model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem_pnn.config.code import DATA_FIELDS, names_code, python_objects
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
from lowmem_pnn.inference.open_parts import OpenPart, SamplesToPredict
from lowmem_pnn.language.tokenizer import check_trained_by
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.reporting.tables import describe_skipped
from lowmem_pnn.samples.normalization import Normalization
from lowmem_pnn.sources.dataset import FRAME_COLUMNS, Dataset, check_columns
from lowmem_pnn.sources.datasets import find_dataset
from lowmem_pnn.sources.given import returned_parts, without_bunch
from lowmem_pnn.sources.imports import load_factory, one_line
from lowmem_pnn.sources.targets import TargetOptions
from lowmem_pnn.workload.data_form import DataForm
from lowmem_pnn.workload.parts import open_apart, split_data
from lowmem_pnn.workload.sources import SampleForm, open_source, resize_of
from lowmem_pnn.zoo.model_source import ModelSource

_Parts = tuple[dict[str, OpenPart], str]
PartName = Literal["train", "val", "test", "all"]
"""Part of the data that is predicted."""

_WORDS = {"train": "training", "val": "validation", "test": "test"}
_FILES = {
    "imagefolder": "DIR", "segmentation": "DIR", "hfdata": "DIR", "npz": "FILE", "csv": "FILE", "parquet": "FILE", "text": "FILE",
}  # fmt: skip
_SUFFIXES = {".npz": "npz", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".jsonl": "jsonl"}


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

    def tell(self, display: Display, result: Result) -> None:
        """Tell people of the samples, and in what they are others than those of training.

        Args:
            display: Is told.
            result: Result of the run.
        """
        display.message(f"data: {self.words}")
        if skipped := self.split.skipped:
            display.message(describe_skipped(list(skipped), len(skipped)))
        for note in self.split.notes:
            display.message(note)
        if not result.preprocessing.startswith(self.preprocessing):
            display.message(f"samples: {self.preprocessing}; in training they were: {result.preprocessing}")


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
    objects = python_objects(vars(config), DATA_FIELDS)
    if data is None and objects:
        raise ConfigError(
            f"the run was trained on data from Python ({', '.join(objects)}), which no name leads to; give the data to predict"
        )
    if data is None or (text and spec == config.data and not objects):
        own = dataclasses.replace(config, skip_broken=config.skip_broken or skip_broken)
        parts, steps = _own_parts(own, sample_form, preparation)
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
        check_columns(f"data {spec}", split.columns, preparation.get(FRAME_COLUMNS, ()))
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


def _own_parts(config: FitConfig, form: SampleForm, preparation: Mapping[str, Any]) -> _Parts:
    """Return the parts of the run's own data, opened and divided as for training."""
    task = "own" if form.options.task == "own" else config.target_task
    form = dataclasses.replace(form, options=TargetOptions(task, config.ignore_index))
    dataset = open_source(config.data, config, form)
    now, then = (made.get("tokenizer_fingerprint") for made in (dataset.preparation, preparation))
    check_trained_by(str(dataset.preparation.get("tokenizer")), now, then)
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
        may_lack = sample_form.may_lack_labels
        splits = open_hub_samples(
            place, config.target, input_form, options, skip_broken=skip_broken, resize=resize, may_lack_labels=may_lack
        )
    elif names_code("data", spec):
        found = _call(spec)
        if isinstance(found, Dataset):
            if skip_broken:
                raise ConfigError(
                    f"--skip-broken has no effect here: {spec!r} returns a Dataset that is made already; leave it out"
                )
            return _of_dataset(found), found.preprocessing
        # Of a list, and of a model of several inputs, these may be samples.
        may_have_parts = form.structure is None and not isinstance(found, list)
        given = (returned_parts(found) if may_have_parts else None) or {"all": found}
        given = {"all": given["train"]} if list(given) == ["train"] else given
        splits = {
            name: open_given(one, f"data {spec}", input_form, form.structure, options, skip_broken=skip_broken, resize=resize)
            for name, one in given.items()
        }
    else:
        dataset = find_dataset(spec, config.data_root, input_form, context=sample_form.context, options=options, resize=resize)
        return _of_dataset(dataset), dataset.preprocessing
    for split, _ in splits.values():
        check_columns(f"data {spec}", split.columns, preparation.get(FRAME_COLUMNS, ()))
    first = next(iter(splits.values()))[0]
    return {name: OpenPart.of_split(*one) for name, one in splits.items()}, ", ".join(first.preprocessing.all_steps)


def _of_table(file: TableFile | DataFrame, form: SampleForm, preparation: Mapping[str, Any], skip_broken: bool) -> _Parts:
    """Return the one part of a table, which may lack its targets, and the steps to its samples."""
    known, forms = TableSchema.from_dict(preparation), (form.input_form, form.options)
    may_lack: Literal["columns", "values"] = "values" if form.may_lack_labels else "columns"
    table = open_table(file, None, *forms, skip_broken=skip_broken, schema=known, may_lack=may_lack)
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

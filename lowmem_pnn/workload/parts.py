"""Parts of a run's data: for training, validation and test, from one source or several, and as the model is to see them."""

import dataclasses
import hashlib
from collections.abc import Mapping

import torch

from lowmem_pnn.config.faults import flag
from lowmem_pnn.config.fit_config import FitConfig, default_of
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.formats.tables import TableSchema
from lowmem_pnn.methods import SplitName
from lowmem_pnn.samples.augment import Augmenter
from lowmem_pnn.samples.normalization import find_normalization, standardization
from lowmem_pnn.samples.prepared import PreparedSplit
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.sources.dataset import FRAME_COLUMNS, Dataset, check_columns, class_numbers, options_like
from lowmem_pnn.sources.image_stats import ImageStats
from lowmem_pnn.sources.splits import SampleSplit, Split
from lowmem_pnn.sources.subsets import RenumberedSplit, as_floats, hold_out, sample_of, train_val_split, whole_of
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.workload.sources import SampleForm, open_source

# Tables seldom come with a test part.
_TABLE_TEST_FRACTION = 0.1

_WORDS: dict[SplitName, str] = {"train": "training", "val": "validation", "test": "test"}


def open_apart(config: FitConfig, dataset: Dataset, form: SampleForm) -> tuple[Dataset, dict[SplitName, Split]]:
    """Open the parts that are given apart, by `--val-data` and `--test-data`.

    Args:
        config: options of the run.
        dataset: the training data, open.
        form: what is known of their samples.

    Returns:
        The data set, with the parts in its fingerprint and its broken samples, and the parts.

    Raises:
        ConfigError: no such data set.
        DataError: it has no such part, or it does not fit the training data.
    """
    parts: dict[SplitName, Split] = {}
    given: tuple[tuple[SplitName, str | None], ...] = (("val", config.val_data), ("test", config.test_data))
    for name, spec in given:
        if spec is None or spec.startswith("python:"):  # opened by whoever has the object
            continue
        form = dataclasses.replace(form, options=options_like(dataset.targets, form.options))
        other = open_source(spec, config, form, dataset.preparation)
        parts[name] = matched(_part_of(other, name, spec), other, dataset, f"{flag(f'{name}_data')} {spec}")
        dataset = with_part(dataset, name, other.fingerprint, other.skipped)
        dataset = dataclasses.replace(dataset, decoding_bytes=max(dataset.decoding_bytes, other.decoding_bytes))
        if other.preprocessing != dataset.preprocessing:
            words = f"{dataset.preprocessing}; {_WORDS[name]} samples: {other.preprocessing}"
            dataset = dataclasses.replace(dataset, preprocessing=words)
    return dataset, parts


def with_part(dataset: Dataset, name: SplitName, fingerprint: str, skipped: Mapping[str, str]) -> Dataset:
    """Return a data set that knows of a part which is given apart from it: such a part belongs to the run's data too.

    Args:
        dataset: the training data.
        name: name of the part.
        fingerprint: hash of the part.
        skipped: broken samples of the part that were left out.
    """
    prints = hashlib.sha256(f"{dataset.fingerprint}{fingerprint}".encode()).hexdigest()
    return dataclasses.replace(dataset, fingerprint=prints, skipped={**dataset.skipped, **skipped})


def _part_of(other: Dataset, name: SplitName, spec: str) -> Split:
    """Return the part of a source that is asked for: the one of that name, or all of a source of one part."""
    parts = {"train": other.train, "val": other.val, "test": other.test}
    if (own := parts[name]) is not None:
        return own
    if other.val is None and other.test is None:
        return other.train
    there = " and ".join(f"a {_WORDS[part]}" for part in ("train", "val", "test") if parts[part] is not None)
    raise DataError(
        f"{flag(f'{name}_data')} {spec} has {there} part, and no {_WORDS[name]} part; give a source of one part, or one that has it"
    )


def matched(part: Split, other: Dataset, dataset: Dataset, what: str) -> Split:
    """Return a part of another source with the class numbers of the training data.

    Args:
        part: the part.
        other: the source.
        dataset: the training data.
        what: name of the part in messages.

    Raises:
        DataError: its samples or classes do not fit those of the training data.
    """
    form, own = ((data.sample_shape, data.label_shape, data.targets.kind) for data in (other, dataset))
    if form != own or other.dtype != dataset.dtype:
        raise DataError(
            f"{what} has samples of shape {other.sample_shape} {_name(other.dtype)} with labels {_labels(other.targets)}, and training "
            f"samples are {dataset.sample_shape} {_name(dataset.dtype)} with labels {_labels(dataset.targets)}; give data of one form"
            f"{', or --image-size' if len(other.sample_shape) == len(dataset.sample_shape) == 3 else ''}"
        )
    if (other.structure, other.inputs) != (dataset.structure, dataset.inputs):
        raise DataError(
            f"{what} has samples of other tensors than the training data has ({_inputs(other)}, and {_inputs(dataset)}); give data of one form"
        )
    check_columns(what, *(data.preparation.get(FRAME_COLUMNS, ()) for data in (other, dataset)))
    if {_scale(other), _scale(dataset)} == {"bytes", "numbers"}:
        raise DataError(
            f"{what}: samples are presented as {other.preprocessing}, and training samples as {dataset.preprocessing}; store both alike"
        )
    if not dataset.targets.are_classes:
        return part
    numbers = class_numbers(what, (other.classes, other.targets), (dataset.classes, dataset.targets))
    return part if numbers is None else RenumberedSplit(part, numbers)


def _scale(data: Dataset) -> str | None:
    """Return whether samples are bytes, which are divided by 255, or numbers as they are; None where the source has its own scale."""
    train = whole_of(data.train)
    if not isinstance(train, SampleSplit):
        return None
    steps = train.preprocessing
    if steps.raw_dtype == torch.uint8:
        return "bytes"
    return "numbers" if _is_table(data) or data.preprocessing.startswith(steps.steps[0]) else None


def _inputs(data: Dataset) -> str:
    return " and ".join(data.preparation.get("input_names", ())) or (
        f"{len(data.inputs)} tensors" if data.inputs else "one tensor"
    )


def _labels(targets: Targets) -> str:
    return f"{targets.shape} ({targets.kind})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def split_data(
    dataset: Dataset, config: FitConfig, apart: Mapping[SplitName, Split] | None = None
) -> tuple[Dataset, dict[SplitName, Split]]:
    """Split a data set into training, validation and test parts.

    Args:
        dataset: open data set.
        config: options of the run.
        apart: parts that are given apart from the data set, and take the place of its own.

    Returns:
        The data set, which says how it was split, and its parts.

    Raises:
        ConfigError: an option for a part that is not there.
        DataError: no sample would be left to train on.
    """
    parts: dict[SplitName, Split | None] = {"val": dataset.val, "test": dataset.test, **(apart or {})}
    how = dict.fromkeys(_WORDS, "")
    fraction, test_fraction, whole = config.val_fraction, config.test_fraction, dataset.train
    if test_fraction is None and _is_table(dataset) and len(whole) > 1:
        test_fraction = 0.0 if parts["test"] is not None else _TABLE_TEST_FRACTION
    if (test := parts["test"]) is not None:
        if test_fraction:
            raise ConfigError(
                f"--test-fraction {test_fraction:g} has no effect here: there is a test part of {len(test):,} samples; leave the option out"
            )
    elif test_fraction:
        whole, parts["test"] = hold_out(whole, test_fraction, seed_of(config.seed, "test split"))
        how["test"] = f" ({test_fraction:g} of the training data, by seed)"
    if (val := parts["val"]) is not None:
        if fraction not in (0, default_of("val_fraction")):
            raise ConfigError(
                f"--val-fraction {fraction:g} has no effect here: data {config.val_data or config.data} has a validation part of {len(val):,} "
                "samples; leave the option out, or give 0 to validate on nothing"
            )
        if fraction == 0 and "val" not in (apart or {}):
            parts["val"] = None
        fraction = 0.0
    train, own_val = train_val_split(whole, fraction, seed_of(config.seed, "split"), config.train_limit)
    splits: dict[SplitName, Split] = {"train": train}
    if (chosen := parts["val"] or own_val) is not None:
        splits["val"] = chosen
        how["val"] = f" ({fraction:g} of the training data, by seed)" if parts["val"] is None else ""
    if (test := parts["test"]) is not None:
        splits["test"] = sample_of(test, config.test_limit, seed_of(config.seed, "test"))
    elif config.test_limit is not None:
        raise ConfigError(f"--test-limit has no effect here: data {config.data} has no test part; leave it out")
    dataset = _in_one_type(dataset, splits)
    verbs: dict[SplitName, str] = {"train": "train", "val": "validate", "test": "test"}
    words = ", ".join(f"{len(split):,} to {verbs[name]} on{how[name]}" for name, split in splits.items())
    absent = [verb for name, verb in verbs.items() if name not in splits]
    return dataclasses.replace(dataset, parts=words + (f", none to {' or '.join(absent)} on" if absent else "")), splits


def _in_one_type(dataset: Dataset, splits: Mapping[SplitName, Split]) -> Dataset:
    """Have the masks of all parts kept in the widest type that one of them needs, as the data set then says: they are stored alike."""
    if dataset.targets.kind != "mask":
        return dataset
    own = [base for base in map(whole_of, splits.values()) if isinstance(base, SampleSplit)]
    dtype = max((base.targets.dtype for base in own), key=lambda dtype: dtype.itemsize, default=dataset.targets.dtype)
    for base in own:
        base.targets = dataclasses.replace(base.targets, dtype=dtype)
    return dataclasses.replace(dataset, targets=dataclasses.replace(dataset.targets, dtype=dtype))


def prepare(
    dataset: Dataset, splits: dict[SplitName, Split], config: FitConfig, stats: ImageStats | None
) -> tuple[Dataset, dict[SplitName, Split]]:
    """Return data as the model is to see it: training samples drawn anew where the data set draws, images augmented, and all normalised.

    Args:
        dataset: open data set.
        splits: its parts.
        config: options of the run.
        stats: statistics of the images that pretrained weights were trained on, if there are such weights.

    Raises:
        ConfigError: the samples are no images, where images are asked for.
    """
    normalize = config.normalize or ("auto" if _is_table(dataset) else "none")
    draws_seed = config.seed if dataset.is_random else None
    if config.augment == "none" and normalize == "none":
        if dataset.is_random:
            splits = {**splits, "train": PreparedSplit(splits["train"], None, None, draws_seed=draws_seed)}
        return dataset, splits
    if dataset.may_be_numbers:
        dataset, splits = dataset.as_floats(), {name: as_floats(split) for name, split in splits.items()}
    asked, shape = f"--augment {config.augment}" if config.augment != "none" else f"--normalize {normalize}", dataset.sample_shape
    if not dataset.dtype.is_floating_point or (config.augment != "none" and len(shape) != 3):
        raise ConfigError(f"{asked} is for images (C, H, W), and the samples of data {dataset.name} are {shape}; leave it out")
    if config.augment not in ("none", "basic") and shape[0] not in (1, 3):
        raise ConfigError(
            f"--augment {config.augment} is for images of 1 or 3 channels, and those of data {dataset.name} have {shape[0]}; give --augment "
            "basic"
        )
    targets = dataset.targets
    is_mask = targets.kind == "mask"
    if is_mask and config.augment not in ("none", "basic"):
        raise ConfigError(
            f"--augment {config.augment} is for classes of whole images: torchvision's policies move no masks; give --augment basic"
        )
    normalization = (
        standardization(splits["train"], TableSchema.from_dict(dataset.preparation).numbers)
        if _is_table(dataset) and normalize == "auto"
        else find_normalization(normalize, splits["train"], config.seed, stats, dataset.name)
    )
    augmenter = None
    if config.augment != "none":
        augmenter = Augmenter(config.augment, len(splits["train"]), config.seed, f"data {dataset.name}")
    prepared: dict[SplitName, Split] = {
        name: PreparedSplit(split, None, normalization)
        if name != "train"
        else PreparedSplit(split, augmenter, normalization, targets.outside if is_mask else None, draws_seed)
        for name, split in splits.items()
    }
    if normalization is None:
        return dataset, prepared
    words = f"{dataset.preprocessing}, {normalization.step}"
    prints = hashlib.sha256(f"{dataset.fingerprint}{normalization.step}".encode()).hexdigest()
    statistics = {"mean": list(normalization.mean), "std": list(normalization.std)}
    preparation = {**dataset.preparation, **statistics}
    return dataclasses.replace(dataset, preprocessing=words, fingerprint=prints, preparation=preparation), prepared


def _is_table(dataset: Dataset) -> bool:
    return "columns" in dataset.preparation

"""Hugging Face's data sets: a folder by `save_to_disk`, or a name on the hub, with rows of named columns."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_pnn.errors import ConfigError, DataError, LowMemError
from lowmem_pnn.sources.dataset import Dataset, join_parts, options_like
from lowmem_pnn.sources.given import LABEL_NAMES
from lowmem_pnn.sources.image_file import as_rgb
from lowmem_pnn.sources.image_folder import PARTS
from lowmem_pnn.sources.imports import did_you_mean, one_line
from lowmem_pnn.sources.map_split import MapSplit
from lowmem_pnn.sources.preprocessing import InputForm
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.sources.splits import SampleSplit
from lowmem_pnn.sources.targets import TargetOptions


def open_hub_data(
    place: str,
    target: Sequence[str] | None,
    input_form: InputForm,
    options: TargetOptions,
    *,
    skip_broken: bool = False,
    resize: Resize | None = None,
) -> Dataset:
    """Open a data set of Hugging Face's library.

    Args:
        place: Folder that `save_to_disk` wrote, or a name on the hub, with `:CONFIGURATION` behind it where there are several.
        target: Name of the column that is to be predicted; None for the one column that is called so, or holds class labels.
        input_form: Form of the samples that the model takes.
        options: What is known of the targets.
        skip_broken: Read every sample once, and leave out those that cannot be used.
        resize: Brings images to one size; None to leave them as they are.

    Raises:
        ConfigError: The library is not installed, or it is not clear which columns are meant.
        DataError: There is no such data set, or a sample cannot be used.
    """
    parts = open_parts(place)
    name = f"hfdata:{place}"
    x_name, y_name = _columns(parts["train"], target, name)
    words = {"train": "training", "val": "validation", "test": "test"}

    classes = _names(parts["train"], y_name)
    for part, rows in parts.items():
        if y_name not in rows.features:
            raise DataError(f"{name}: the {words[part]} part has no column {y_name!r}; leave the part out, or give it one")
        if _names(rows, y_name) != classes:
            raise DataError(
                f"{name}: column {y_name!r} has other classes in the {words[part]} part, or in another order, than in the training part; cast "
                "it to one ClassLabel (cast_column)"
            )

    def split_of(part: str, known: TargetOptions) -> MapSplit:
        rows = HubRows(parts[part], x_name, y_name)
        return MapSplit(rows, None, input_form, f"{name} ({words[part]} part)", skip_broken, known, resize)

    splits = {"train": split_of("train", options)}
    known = options_like(splits["train"].targets, options)
    splits |= {part: split_of(part, known) for part in parts if part != "train"}
    if classes:
        for split in splits.values():
            split.targets = split.targets.of_classes(len(classes)) if split.targets.are_classes else split.targets
    is_image = _is_image(parts["train"].features[x_name])
    return join_parts(
        Path(place).name,
        splits["train"],
        splits.get("test"),
        splits.get("val"),
        first_steps=_steps(splits["train"]) if is_image else None,
        classes=classes if splits["train"].targets.kind == "class" else (),
    )


def open_hub_samples(
    place: str,
    target: Sequence[str] | None,
    input_form: InputForm,
    options: TargetOptions,
    *,
    skip_broken: bool = False,
    resize: Resize | None = None,
    may_lack_labels: bool = True,
) -> dict[str, tuple[SampleSplit, bool]]:
    """Open a data set of Hugging Face's library to predict it: its targets may be missing, and any part will do.

    Args:
        place: As for `open_hub_data`.
        target: Name of the column that was predicted in training; None for the one that is called so, or holds class labels.
        input_form: Form of the samples that the model takes.
        options: What is known of the targets.
        skip_broken: Read every sample once, and leave out those that cannot be used.
        resize: Brings images to one size; None to leave them as they are.
        may_lack_labels: Whether labels below 0, which parts whose labels nobody is to know have, stand for none.

    Returns:
        The parts by name, `all` where there is but one without a name, each with whether its samples have targets.

    Raises:
        ConfigError: The library is not installed, or it is not clear which columns are meant.
        DataError: There is no such data set, or a sample cannot be used.
    """
    opened: dict[str, tuple[SampleSplit, bool]] = {}
    for part, rows in open_parts(place, needs_train=False).items():
        name = f"hfdata:{place} ({part} part)"
        y_name = _target(rows, target)
        x_name = _samples(rows, y_name, f"hfdata:{place}")
        notes: tuple[str, ...] = ()
        if may_lack_labels and y_name is not None and _lacks_labels(rows, y_name, options):
            notes = (f"targets of {name} are left aside: column {y_name!r} holds labels that are missing or below 0",)
            y_name = None
        own = options if y_name is not None else TargetOptions()
        split = MapSplit(HubRows(rows, x_name, y_name), None, input_form, name, skip_broken, own, resize)
        split.classes, split.notes = () if y_name is None else _names(rows, y_name), notes
        opened[part] = split, y_name is not None
    return opened


class HubRows:
    """Rows of a data set as pairs.

    Args:
        rows: The data set.
        x_name: Column of the samples; images become RGB, those of more than 8 bits a value float32 from 0 to 1.
        y_name: Column of the targets; None for rows without targets, whose class is 0.
    """

    def __init__(self, rows: Any, x_name: str, y_name: str | None) -> None:
        self._rows, self._x_name, self._y_name = rows, x_name, y_name
        names = [""] if y_name is None else getattr(rows.features[y_name], "names", None)
        if names:
            self.classes = list(names)
            """Names of the classes, which spare reading all rows to count them."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self._rows[index]
        x = row[self._x_name]
        if hasattr(x, "getpalette"):
            x = as_rgb(x, f"image {index} of column {self._x_name!r}")
            # Which axis is that of channels shows in bytes alone.
            x = x if x.dtype == np.uint8 else np.ascontiguousarray(x.transpose(2, 0, 1))
        return x, 0 if self._y_name is None else row[self._y_name]


def open_parts(place: str, needs_train: bool = True) -> dict[str, Any]:
    """Return the parts of a data set by our names: `train`, and `val` and `test` where there are such.

    Args:
        place: As for `open_hub_data`.
        needs_train: Whether there has to be a training part; else one without parts is `all`.

    Raises:
        ConfigError: The library is not installed.
        DataError: There is no such data set, or it has no training part.
    """
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError("hfdata: needs datasets, which is not installed; run: pip install 'lowmem-pnn[hfdata]'") from error
    name, _, configuration = place.partition(":")
    try:
        if Path(place).expanduser().is_dir():
            found = library.load_from_disk(str(Path(place).expanduser()))
        else:
            found = library.load_dataset(name, configuration or None)
    except (LowMemError, MemoryError):
        raise
    # The library raises nearly anything for a name that there is not, a network that is down, and a damaged folder.
    except Exception as error:
        raise DataError(
            f"data hfdata:{place} cannot be opened: {one_line(error)}; give a folder that save_to_disk wrote, or a name on the hub"
        ) from error
    if not isinstance(found, Mapping):
        return {"train" if needs_train else "all": found}
    parts: dict[str, Any] = {}
    for own, rows in found.items():
        if (part := PARTS.get(own.lower())) in parts:
            raise DataError(
                f"data hfdata:{place} has the parts {', '.join(map(repr, found))}, two of which are one to us ({part}); leave one out"
            )
        if part is not None:
            parts[part] = rows
    if not parts and not needs_train:
        return dict(found)
    if "train" not in parts and needs_train:
        raise DataError(
            f"data hfdata:{place} has the parts {', '.join(map(repr, found))}, and no training part; save one called train"
        )
    return {part: parts[part] for part in ("train", "val", "test") if part in parts}


def _columns(rows: Any, target: Sequence[str] | None, name: str) -> tuple[str, str]:
    """Return the columns of samples and targets."""
    features = dict(rows.features)
    if target is not None and len(target) > 1:
        raise ConfigError(f"data {name}: --target {','.join(target)} names several columns; give one")
    y_name = _target(rows, target)
    if y_name is None and target is not None:
        raise ConfigError(f"data {name} has no column {target[0]!r}{did_you_mean(target[0], list(features))}")
    if y_name is None:
        raise ConfigError(f"data {name} needs --target COLUMN; its columns are {', '.join(features)}")
    return _samples(rows, y_name, name), y_name


def _target(rows: Any, target: Sequence[str] | None) -> str | None:
    """Return the column of targets: the one that is asked for, or the only one that may be; None where there is none, or several."""
    features = dict(rows.features)
    if target is not None:
        return target[0] if target[0] in features else None
    labels = [own for own, feature in features.items() if getattr(feature, "names", None)] or [
        own for own in features if own in LABEL_NAMES
    ]
    return labels[0] if len(labels) == 1 else None


def _samples(rows: Any, y_name: str | None, name: str) -> str:
    """Return the column of samples: the only one of images, or the only one beside the targets."""
    features: dict[str, Any] = dict(rows.features)
    others = [own for own in features if own != y_name]
    chosen = [own for own in others if _is_image(features[own])] or others
    if len(chosen) != 1:
        raise ConfigError(
            f"data {name} has the columns {', '.join(features)}, and which one samples are of is not clear; leave others out with "
            "remove_columns()"
        )
    return chosen[0]


def _lacks_labels(rows: Any, y_name: str, options: TargetOptions) -> bool:
    """Return whether a class is missing, or below 0, by which the hub's data sets say that nobody is to know it."""
    if not _names(rows, y_name):
        return False
    return any(label is None or (label < 0 and label != options.ignored) for label in rows[y_name])


def _steps(split: MapSplit) -> tuple[str, ...]:
    """Return the steps from images to values from 0 to 1, in words."""
    if split.preprocessing.raw_dtype == torch.uint8:
        return ("decoded to RGB", "uint8 / 255")
    return ("decoded to RGB", "HWC to CHW", "grey values of more than 8 bits brought to 0 to 1")


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _names(rows: Any, y_name: str) -> tuple[str, ...]:
    """Return the names of the classes of a column, by their numbers; none where it has none."""
    return tuple(map(str, getattr(rows.features.get(y_name), "names", None) or ()))

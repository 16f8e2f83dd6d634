"""Data without targets: folders of images without classes, and arrays or data sets of samples alone, for a model to predict them."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lowmem_pnn.errors import DataError
from lowmem_pnn.formats.data_loader import without_loader
from lowmem_pnn.sources.arrays import as_tensor
from lowmem_pnn.sources.datasets import read_npz
from lowmem_pnn.sources.given import LABEL_NAMES, as_pair, column_names, is_array, require_map_style
from lowmem_pnn.sources.image_file import words_of
from lowmem_pnn.sources.image_folder import (
    ImageFolderSplit,
    ImagePart,
    images_below,
    images_in,
    look_at,
    named_parts,
)
from lowmem_pnn.sources.imports import did_you_mean, one_line
from lowmem_pnn.sources.map_split import from_arrays, from_torch, refuse_skipping
from lowmem_pnn.sources.preprocessing import InputForm
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.sources.splits import SampleSplit
from lowmem_pnn.sources.structured_split import from_structured_arrays
from lowmem_pnn.sources.targets import TargetOptions

Parts = dict[str, tuple[SampleSplit, bool]]
"""Parts of a source by name, `all` where it has none, each with whether its samples have targets."""

_NPZ_KEYS = (("train", "x_train", "y_train"), ("val", "x_val", "y_val"), ("test", "x_test", "y_test"), ("all", "x", "y"))


def open_images(
    folder: Path, input_form: InputForm, classes: Sequence[str], *, skip_broken: bool = False, resize: Resize | None = None
) -> tuple[Parts, str]:
    """Open the images of a folder, at any depth, or one image file.

    Folders called train, val or test are parts. Images have targets where all lie in folders that are called as the classes are.

    Args:
        folder: Folder, or a file.
        input_form: Form of the samples that the model takes.
        classes: Names of the classes that the model knows.
        skip_broken: Leave out images that cannot be used, instead of raising.
        resize: Brings images to one size; None where all have one size.

    Returns:
        The parts, and the steps from files to samples in words.

    Raises:
        DataError: There is no such folder, no image in it, an image beside the parts, or an image cannot be used.
    """
    if folder.is_file():
        places = {"all": ImagePart(folder.parent, (folder,), (0,))}
    elif folder.is_dir():
        named = _named_parts(folder)
        below = {part: images_below(path, folder) for part, path in (named or {"all": folder}).items() if path != folder}
        if not named:
            below = {"all": images_below(folder, folder.resolve().parent)}
        roots = named or {"all": folder}
        places = {part: ImagePart(roots[part], tuple(paths), (0,) * len(paths)) for part, paths in below.items() if paths}
    else:
        raise DataError(f"there is no folder or image {folder.absolute()}; give imagefolder:DIR")
    if not places:
        raise DataError(f"{folder} holds 0 images at any depth; give a folder with at least 1")
    headers, broken = look_at(places, skip_broken, resize)
    total = sum(len(part.paths) for part in places.values())
    if broken and (not skip_broken or len(broken) == total):
        raise DataError(
            f"{next(iter(broken.values()))}; {len(broken):,} of {total:,} images cannot be used, --skip-broken leaves them out"
        )
    parts: Parts = {}
    used = []
    for name, part in places.items():
        kept = part.without(broken)
        if not kept.paths:
            continue
        own = [headers[path] for path in kept.paths]
        used += own
        labels, notes = _classes_of(kept, classes)
        split = ImageFolderSplit(
            part.folder,
            kept.paths,
            (0,) * len(kept.paths) if labels is None else labels,
            max(1, len(classes)),
            own[0],
            any(header.bits > 8 for header in own),
            input_form,
            resize,
        )
        split.skipped, split.notes = {str(path): broken[path] for path in part.paths if path in broken}, notes
        parts[name] = split, labels is not None
    first = next(iter(parts.values()))[0]
    return parts, ", ".join(first.preprocessing.steps_after(words_of(used)))


def _named_parts(folder: Path) -> dict[str, Path]:
    """Find the folders that are named as parts are; images beside them would be left out."""
    named, others = named_parts(folder)
    beside = [*images_in(folder), *itertools.chain(*(images_below(path, folder) for path in others))] if named else []
    if beside:
        here, first = ", ".join(repr(path.name) for path in named.values()), next(iter(named.values()))
        raise DataError(
            f"{folder} holds {here}, named as a part of the data is, and beside that other images, such as {beside[0]}; give "
            f"each by itself (imagefolder:{first}), or rename {here}"
        )
    return named


def _classes_of(part: ImagePart, classes: Sequence[str]) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return the class number of each image, by the folder below the part's that it is in; None where some are in no such folder.

    Where others are, it is said which are not.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    places = [path.relative_to(part.folder).parts[0] for path in part.paths]
    if unknown := [place for place in places if place not in numbers]:
        which = f"{unknown[0]!r} is called as no class of the training data is{did_you_mean(unknown[0], list(classes))}"
        left = (f"targets of {part.folder} are left aside: {which}",)
        return None, left if len(unknown) < len(places) else ()
    return tuple(numbers[place] for place in places), ()


def open_npz(
    path: Path, input_form: InputForm, options: TargetOptions, *, skip_broken: bool = False, resize: Resize | None = None
) -> Parts:
    """Open the arrays of a .npz file: x alone, or x_train, x_val and x_test, with or without targets.

    Args:
        path: Path of the file.
        input_form: Form of the samples that the model takes.
        options: What is known of the targets.
        skip_broken: Leave out samples that cannot be used, instead of raising.
        resize: Brings images to one size; None to leave them as they are.

    Raises:
        DataError: The file cannot be read, or holds no such arrays.
    """
    arrays = read_npz(path, tuple(key for _, *keys in _NPZ_KEYS for key in keys))
    present = [entry for entry in _NPZ_KEYS if entry[1] in arrays]
    if not present:
        raise DataError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, and no x; save samples as x, or as x_test, with numpy.savez"
        )
    parts: Parts = {}
    for name, x_key, y_key in present:
        x = as_tensor(arrays[x_key], f"{path}: {x_key}")
        if y_key in arrays:
            split = from_arrays(
                x,
                arrays[y_key],
                num_classes=None,
                input_form=input_form,
                where=f"{path}: {x_key}",
                options=options,
                labels_name=f"{path}: {y_key}",
                resize=resize,
            )
        else:
            split = _alone(x, input_form, f"{path}: {x_key}", resize)
        if skip_broken:
            split.skip_broken()
        split.check()
        parts[name] = split, y_key in arrays
    return parts


def open_given(
    data: Any,
    where: str,
    input_form: InputForm,
    structure: pytree.TreeSpec | None,
    options: TargetOptions,
    *,
    skip_broken: bool = False,
    resize: Resize | None = None,
) -> tuple[SampleSplit, bool]:
    """Open data that was given from Python: samples alone, or with targets.

    A tuple of two arrays is samples and targets; a list is samples.

    Args:
        data: Array, tensor, table, list or structure of samples; a tuple (samples, targets); a map-style data set of samples, or of pairs; or
            a `DataLoader` of one.
        where: Name of the data in messages.
        input_form: Form of the samples that the model takes.
        structure: Structure of a sample, where it is several tensors.
        options: What is known of the targets.
        skip_broken: Leave out samples that cannot be used, instead of raising.
        resize: Brings images to one size; None to leave them as they are.

    Returns:
        The samples, and whether they have targets.

    Raises:
        DataError: They cannot be used.
    """
    data = without_loader(data, where)
    if isinstance(data, SampleSplit):
        return data, True
    if structure is not None and _has(data, structure):
        refuse_skipping(skip_broken, where)
        x = pytree.tree_map(lambda leaf: as_tensor(leaf, where), data)
        if any(leaf.ndim < 1 for leaf in pytree.tree_leaves(x)):
            raise DataError(f"{where} holds one sample; give samples (N, ...)")
        return from_structured_arrays(x, torch.zeros(len(pytree.tree_leaves(x)[0]), dtype=torch.int64), where), False
    if isinstance(data, tuple) and as_pair(data) is not None:
        return from_torch(data, input_form=input_form, where=where, skip_broken=skip_broken, options=options, resize=resize), True
    if is_array(data) or (isinstance(data, list) and data and not isinstance(data[0], tuple | dict) and not _is_image(data[0])):
        x = as_tensor(data, where)
        if x.ndim < 1:
            raise DataError(f"{where} is one number; give samples (N, ...)")
        split = _alone(x, input_form, where, resize)
        split.columns = column_names(data)
        if skip_broken:
            split.skip_broken()
        split.check()
        return split, False
    require_map_style(data, where)
    try:
        first = data[0] if len(data) else None
    # Whatever a user's data set raises is the user's to see, on one line, with the original as the cause.
    except Exception as error:
        raise DataError(f"sample 0 of {where} cannot be read: {one_line(error)}; repair it") from error
    labelled = _is_labelled(first, structure)
    rows = data if labelled else WithoutTargets(data, is_one=structure is None)
    own = options if labelled else TargetOptions()
    return from_torch(rows, input_form=input_form, where=where, skip_broken=skip_broken, options=own, resize=resize), labelled


class WithoutTargets:
    """Samples of a map-style data set as pairs, with a target that stands for none.

    Args:
        samples: The data set.
        is_one: Whether a sample is one tensor: a tuple of one, as a `TensorDataset` of samples alone gives, then is that tensor.
    """

    classes = ("",)

    def __init__(self, samples: Any, is_one: bool) -> None:
        self._samples, self._is_one = samples, is_one

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item = self._samples[index]
        if self._is_one and isinstance(item, tuple | list) and len(item) == 1 and not isinstance(item[0], int | float):
            return item[0], 0
        # A dictionary with one value is that value, as with a target beside it.
        return next(iter(item.values())) if isinstance(item, dict) and len(item) == 1 else item, 0


def _alone(x: torch.Tensor, input_form: InputForm, where: str, resize: Resize | None) -> Any:
    return from_arrays(
        x, torch.zeros(len(x), dtype=torch.int64), num_classes=1, input_form=input_form, where=where, resize=resize
    )


def _has(data: Any, structure: pytree.TreeSpec) -> bool:
    """Whether data is a structure of arrays, and the structure that samples have."""
    if not isinstance(data, dict | tuple):
        return False
    leaves, tree = pytree.tree_flatten(data)
    return tree == structure and all(map(is_array, leaves))


def _is_labelled(sample: Any, structure: pytree.TreeSpec | None) -> bool:
    """Whether what a data set gives at an index is a sample and its target."""
    if structure is not None and isinstance(sample, dict | tuple) and pytree.tree_structure(sample) == structure:
        return False
    if isinstance(sample, dict):
        return any(name in LABEL_NAMES for name in sample)
    return isinstance(sample, tuple | list) and len(sample) == 2 and not all(isinstance(one, int | float) for one in sample)


def _is_image(value: Any) -> bool:
    return hasattr(value, "getpalette")

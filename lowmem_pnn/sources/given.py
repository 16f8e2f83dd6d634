"""Data as people give it from Python: pairs of arrays, tables or lists, and what is no data set, with what to give instead."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowmem_pnn.errors import DataError, LowMemError
from lowmem_pnn.sources.arrays import as_labels, count_classes
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.sources.targets import Targets

LABEL_NAMES = ("y", "label", "labels", "target", "targets")
"""What data sets call the label of a sample, in dictionaries."""


def as_pair(data: Any) -> tuple[Any, Any] | None:
    """Return samples and labels of data that are given whole, or None where they come one by one, from a map-style data set.

    A tuple of two is such a pair if the first is an array, a tensor, a table or a list, and the second is one, a list of numbers or
    words, or a tuple or dictionary of arrays. A list of two is a data set of two samples, unless its first is an array.

    Args:
        data: What was given.

    Example:
        >>> as_pair((np.zeros((2, 3)), [0, 1])) is not None, as_pair([(np.zeros(3), 0), (np.zeros(3), 1)]) is None
        (True, True)
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        return None
    x, y = data
    if is_array(x) and (is_array(y) or isinstance(y, list | tuple | range) or _holds_arrays(y)):
        return x, y
    if isinstance(data, tuple) and _holds_arrays(x) and (is_array(y) or isinstance(y, list | dict)):
        return x, y
    if isinstance(data, tuple) and isinstance(x, list) and (is_array(y) or isinstance(y, range) or _holds_scalars(y)):
        return x, y
    return None


def returned_parts(data: Any) -> dict[str, Any] | None:
    """Return the parts of data that a user's function has returned: `train`, `val` and `test`; None where it is one part.

    Parts are a pair (train, test), a triple (train, val, test), or a dictionary with `train` and any of `val`, `validation` and `test`,
    as data sets of `datasets` are. A part that is None is left out.

    Args:
        data: What was returned.

    Example:
        >>> part = np.zeros((2, 3)), [0, 1]
        >>> list(returned_parts((part, part))), list(returned_parts((part, None, part))), returned_parts(part)
        (['train', 'test'], ['train', 'test'], None)
    """
    parts: dict[str, Any] = {}
    if isinstance(data, Mapping) and "train" in data and set(data) <= {"train", "val", "validation", "test"}:
        parts = {"val" if name == "validation" else str(name): part for name, part in data.items()}
    elif isinstance(data, tuple | list) and len(data) == 2 and as_pair(data) is None:
        parts = dict(zip(("train", "test"), data, strict=True))
    elif isinstance(data, tuple) and len(data) == 3 and all(map(_may_be_part, data)):
        parts = dict(zip(("train", "val", "test"), data, strict=True))
    return {name: part for name, part in parts.items() if part is not None} or None


def without_bunch(data: Any) -> Any:
    """Return samples and targets of scikit-learn's data sets, which its `load_` and `fetch_` functions give; other data as it is.

    Args:
        data: What was given.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> x, y = without_bunch(load_iris())
        >>> x.shape, y.shape
        ((150, 4), (150,))
    """
    if type(data).__name__ == "Bunch" and data.get("data") is not None and data.get("target") is not None:
        return data["data"], data["target"]
    return data


def as_sample(item: Any, where: str) -> tuple[Any, Any]:
    """Return x and label of one sample: a pair, or a dictionary with one of the usual names for the label, and others for x.

    Args:
        item: What a data set gives at an index.
        where: Name of the sample in messages.

    Raises:
        DataError: It is neither.

    Example:
        >>> as_sample({"image": 5, "label": 1}, "sample 0")
        (5, 1)
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, Mapping):
        labels = [name for name in item if name in LABEL_NAMES]
        others = [name for name in item if name not in LABEL_NAMES]
        if len(labels) == 1 and others:
            return item[others[0]] if len(others) == 1 else {name: item[name] for name in others}, item[labels[0]]
        raise DataError(
            f"{where} is a dictionary of {', '.join(map(repr, list(item)[:6])) or 'nothing'}; give one value under one of "
            f"{', '.join(map(repr, LABEL_NAMES))} and at least one other, or pairs (x, target)"
        )
    content = f"{len(item)} values" if isinstance(item, tuple | list) else f"a {type(item).__name__}"
    raise DataError(f"{where} is {content}; a data set must give pairs (x, target)")


def require_map_style(data: Any, where: str) -> None:
    """Refuse what has no sample at every index.

    Args:
        data: What was given as a data set.
        where: Name of the data set in messages.

    Raises:
        DataError: It is a loader, a stream, a dictionary, or something else that is not indexed.
    """
    kind = type(data).__name__
    if isinstance(data, torch.utils.data.DataLoader):
        raise DataError(
            f"{where} is a DataLoader; give the data set that it loads from (loader.dataset), or the loader itself to lowmem_pnn.fit: "
            "batches and their order are made here, as --batch-size and --shuffle say"
        )
    if isinstance(data, torch.utils.data.IterableDataset):
        raise DataError(
            f"{where} is an IterableDataset ({kind}), a stream; give a map-style data set, so that every index has a fixed sample: "
            "list(stream) where it fits in memory, or tensors (x, y)"
        )
    if isinstance(data, dict):
        names = ", ".join(map(repr, list(data)[:4]))
        raise DataError(f"{where} is a dict ({names}); give the pair (x, y), or a map-style data set of pairs")
    if is_array(data):
        raise DataError(f"{where} is one {kind}, without labels; give the pair (x, y)")
    if isinstance(data, tuple | list) and len(data) == 2 and is_array(data[0]):
        raise DataError(f"{where}: the labels are a {type(data[1]).__name__}; give a tensor, an array or a list of class numbers")
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise DataError(
            f"{where} is a {kind} without __getitem__ and __len__; give a map-style data set, so that every "
            "index has a fixed sample, or tensors (x, y)"
        )
    try:
        len(data)
    except (LowMemError, MemoryError):
        raise
    # Whatever a user's data set raises is the user's to see, on one line, with the original as the cause.
    except Exception as error:
        raise DataError(f"{where} is a {kind} whose length cannot be told: {one_line(error)}; see to its __len__") from error


def is_array(value: Any) -> bool:
    """Decide whether a value is an array, a tensor or a table."""
    # Tables have `to_numpy`, sparse matrices `toarray`, arrays of other libraries `__array__`.
    return isinstance(value, Tensor | np.ndarray) or any(hasattr(value, name) for name in ("to_numpy", "toarray", "__array__"))


def _may_be_part(value: Any) -> bool:
    """Decide whether one of three values is a part of the data, or none; else the three are samples."""
    if value is None or as_pair(value) is not None:
        return True
    is_indexed = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    return is_indexed and not isinstance(value, tuple | str | Mapping) and not is_array(value)


def _holds_arrays(value: Any) -> bool:
    return isinstance(value, dict | tuple) and bool(value) and all(map(is_array, pytree.tree_leaves(value)))


def _holds_scalars(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], bool | int | float | str | np.generic)


def column_names(samples: Any) -> tuple[str, ...]:
    """Return the names of the columns of a table; none of arrays, and of tables whose columns have numbers alone.

    Args:
        samples: Samples (N, F), as they were given.
    """
    columns = getattr(samples, "columns", None)
    if columns is None or not hasattr(samples, "to_numpy") or list(columns) == list(range(len(columns))):
        return ()
    return tuple(map(str, columns))


def known_classes(dataset: Any, where: str, form: Targets) -> int | None:
    """Return the number of classes of a map-style data set if that is known without reading the samples one by one."""
    of_tokens = form.kind == "tokens"
    tensors = getattr(dataset, "tensors", None)
    if of_tokens and isinstance(dataset, torch.utils.data.Subset):
        return known_classes(dataset.dataset, where, form)
    if of_tokens:
        return count_classes(*tensors, form.ignored) if isinstance(tensors, tuple) and len(tensors) == 2 else None
    if changes_targets(dataset):
        changed = changed_targets(dataset)
        return None if changed is None else _count(changed, where, form)
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, list | tuple) and classes:
        return len(classes)
    labels = getattr(dataset, "targets", None)
    if labels is None:
        labels = tensors[-1] if isinstance(tensors, tuple) else None
    if labels is None and isinstance(dataset, torch.utils.data.Subset):
        return known_classes(dataset.dataset, where, form)
    return None if labels is None else _count(labels, where, form)


def _count(labels: Any, where: str, form: Targets) -> int | None:
    """Return the number of classes of some labels; None where these are no class numbers."""
    try:
        numbers = as_labels(labels, where)
    except DataError:
        # A data set may turn what it calls `targets` into class numbers as a sample is read.
        return None
    return form.count(numbers) if numbers.numel() else None


def first_of_each_class(dataset: Any) -> list[int]:
    """Return the number of the first sample of each class, of a map-style data set whose labels are known without reading the samples."""
    if isinstance(dataset, torch.utils.data.Subset):
        inner, places = dataset.dataset, np.asarray(dataset.indices)
    else:
        inner, places = dataset, None
    with suppress(Exception):  # anything may be called `targets`
        labels = np.asarray(inner.targets)  # type: ignore[attr-defined]
        labels = labels if places is None else labels[places]
        if labels.ndim == 1 and len(labels) == len(dataset):
            return [int(number) for number in np.unique(labels, return_index=True)[1]]
    return []


def class_names(dataset: Any) -> tuple[str, ...]:
    """Return the names of the classes of a map-style data set, by their numbers; none where it has none, or changes the numbers.

    Args:
        dataset: The data set.
    """
    while isinstance(dataset, torch.utils.data.Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    if not isinstance(names, list | tuple) or changes_targets(dataset):
        return ()
    is_named = all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)
    return tuple(names) if is_named else ()


def changes_targets(dataset: Any) -> bool:
    """Return whether a data set, of torchvision's form, gives other targets than the classes that it lists.

    Args:
        dataset: The data set.
    """
    return any(getattr(one, "target_transform", None) is not None for one in (dataset, getattr(dataset, "transforms", None)))


def changed_targets(dataset: Any) -> list[Any] | None:
    """Return the different targets that a data set of torchvision's form makes of those that it lists; None where it lists none.

    Args:
        dataset: The data set, which changes its targets one by one.
    """
    targets, change = getattr(dataset, "targets", None), getattr(dataset, "target_transform", None)
    if not isinstance(targets, list) or change is None:
        return None
    # What cannot be changed here is said where a sample is read.
    with suppress(Exception):
        return list({change(target) for target in set(targets)})
    return None


def listed_target(dataset: Any, number: int) -> int | None:
    """Return the class that a map-style data set lists for a sample; None where it lists none.

    Args:
        dataset: The data set.
        number: Number of the sample.
    """
    while isinstance(dataset, torch.utils.data.Subset):
        dataset, number = dataset.dataset, dataset.indices[number]
    with suppress(Exception):
        return int(dataset.targets[number])
    return None

"""What map-style data sets list of their classes beside their samples, in torchvision's form: names, and a target for each sample."""

from contextlib import suppress
from typing import Any

import numpy as np
import torch

from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.arrays import as_labels, count_classes
from lowmem_pnn.sources.targets import Targets


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

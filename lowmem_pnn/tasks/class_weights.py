"""Weights of classes by how rare they are in the training data."""

import numpy as np
import torch

from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.samples.epochs import all_samples
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.sources.subsets import labels_of
from lowmem_pnn.sources.targets import Targets

# Samples whose targets are read at once.
_AT_ONCE = 256


def balanced_weights(split: Split, targets: Targets) -> tuple[float, ...]:
    """Return weights by which all classes count alike.

    Of classes: samples / (classes * samples of the class), as scikit-learn's `class_weight="balanced"`; of labels: samples without the
    label / samples with it, for `pos_weight` of PyTorch's binary cross entropy.

    Args:
        split: Training samples, whose targets are read once.
        targets: Form of the targets.

    Raises:
        ConfigError: A class has no sample, so that no weight would balance it.
        DataError: A label is no class.
    """
    count = all_samples(split)
    counts = torch.zeros(targets.num_classes, dtype=torch.int64)
    for begin in range(0, count, _AT_ONCE):
        kept = labels_of(split, np.arange(begin, min(begin + _AT_ONCE, count)))
        if targets.kind == "labels":
            counts += kept.to(torch.int64).sum(0)
        else:
            counted = kept[kept != targets.ignored] if targets.ignored is not None else kept.flatten()
            wrong = counted[(counted < 0) | (counted >= targets.num_classes)]
            if wrong.numel():
                raise DataError(
                    f"--class-weights balanced: a training sample has label {int(wrong[0])}, outside 0 to {targets.num_classes - 1} "
                    f"({targets.num_classes} classes); number the classes from 0"
                )
            counts += torch.bincount(counted.long(), minlength=targets.num_classes)
    if bool((counts == 0).any()):
        missing = int((counts == 0).nonzero()[0])
        what = "label" if targets.kind == "labels" else "class"
        raise ConfigError(
            f"--class-weights balanced: {what} {missing} of {targets.num_classes} is in no training sample; give weights as numbers"
        )
    found = counts.tolist()
    if targets.kind == "labels":
        return tuple((count - own) / own or 1.0 for own in found)
    return tuple(sum(found) / (len(found) * own) for own in found)

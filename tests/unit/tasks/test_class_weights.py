"""Weights of classes by how rare they are: of all training samples, whatever an epoch takes of them."""

from typing import Any

import pytest
import torch
from torch.utils.data import WeightedRandomSampler

from helpers.datasets import Pairs
from lowmem_pnn.errors import DataError
from lowmem_pnn.samples.epochs import EpochSampler, as_epochs
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.tasks.class_weights import balanced_weights


@pytest.mark.parametrize("drawn", [None, 3, 40])
def test_balanced_labels_count_the_samples_that_lack_them(drawn: int | None) -> None:
    labels = torch.zeros(20, 2, dtype=torch.int64)
    labels[:19, 0] = labels[:4, 1] = 1
    split = from_torch((torch.rand(20, 3), labels))
    sampler = None if drawn is None else EpochSampler(WeightedRandomSampler([1.0] * 20, drawn), 20, "mine")
    epochs = as_epochs(split, 16 if drawn is None else None, sampler)
    assert balanced_weights(epochs, split.targets) == balanced_weights(split, split.targets) == (1 / 19, 16 / 4)


@pytest.mark.parametrize("wrong", [-1, 7])
def test_a_label_that_is_no_class_is_said(wrong: int) -> None:
    data: Any = Pairs([(torch.rand(3), label) for label in (0, 1, wrong, 2)])
    data.classes = ["a", "b", "c"]
    split = from_torch(data)
    with pytest.raises(
        DataError, match=rf"^--class-weights balanced: a training sample has label {wrong}, outside 0 to 2 \(3 classes\)"
    ):
        balanced_weights(split, split.targets)

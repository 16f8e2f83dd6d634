"""The form of a run's samples and targets: what is kept of it comes back from JSON as it was."""

import json
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_pnn.sources.datasets import make_dataset
from lowmem_pnn.sources.targets import TargetOptions
from lowmem_pnn.workload.data_form import DataForm, ZeroSplit


def back(form: DataForm) -> DataForm:
    return DataForm.from_dict(json.loads(json.dumps(form.to_dict())))


X = torch.rand(4, 3)


@pytest.mark.parametrize(
    "data",
    [
        (X, torch.arange(4)),
        (X, torch.rand(4, 2)),
        (torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.int64)),
        (torch.rand(4, 3, 6, 6), torch.zeros(4, 6, 6, dtype=torch.uint8)),
        ({"a": X, "b": torch.zeros(4, dtype=torch.int64)}, torch.arange(4)),
        ((X, (X, X)), torch.arange(4)),
    ],
)
def test_it_comes_back_as_it_was(data: Any) -> None:
    dataset = make_dataset(data, name="mine")
    form = DataForm.of(dataset)
    assert back(form) == form
    empty = back(form).dataset("mine")
    assert (empty.sample_shape, empty.dtype, empty.inputs, empty.structure, empty.targets) == (
        dataset.sample_shape, dataset.dtype, dataset.inputs, dataset.structure, dataset.targets
    )  # fmt: skip
    zeros, targets = empty.train.batch([1, 0])
    given, wanted = dataset.train.batch([1, 0])
    leaves = [(one, other) for one, other in zip(_tuple(zeros), _tuple(given), strict=True)]
    assert [(one.shape, one.dtype) for one, _ in leaves] == [(other.shape, other.dtype) for _, other in leaves]
    assert (targets.shape, targets.dtype) == (wanted.shape, wanted.dtype)
    assert isinstance(empty.train, ZeroSplit)
    assert not empty.may_be_numbers


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_targets_of_a_loss_of_ones_own_are_not_kept() -> None:
    dataset = make_dataset((X, {"a": X, "b": X}), name="mine", options=TargetOptions("own"))
    kept = back(DataForm.of(dataset)).targets
    assert (kept.kind, kept.shape, kept.packing) == ("own", (), None)


def test_what_json_cannot_hold_is_empty() -> None:
    pair = namedtuple("pair", "left right")
    dataset = make_dataset([(pair(np.zeros(2), np.zeros(3)), number) for number in range(3)], name="mine")
    assert DataForm.of(dataset).to_dict() == {}

"""Losses of the user's own: how much the parts of a batch weigh, found out from the loss itself and from differing samples."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks.own_loss import OwnTask
from lowmem_pnn.workload.option_checks import try_own

WEIGHTS = torch.tensor([1.0, 20.0])
SCORES = (TensorSpec((2,), torch.float32),)


def task(loss: Any) -> OwnTask:
    return OwnTask(Targets("own", 2), loss, "python:loss", lambda tensors: tensors[0])


@pytest.mark.parametrize(
    ("loss", "whole"),
    [
        (lambda out, y: F.cross_entropy(out, y, WEIGHTS), True),
        (lambda out, y: F.cross_entropy(out, y), False),
        (lambda out, y: (F.cross_entropy(out, y, WEIGHTS, reduction="sum"), WEIGHTS[y].sum()), False),
        (nn.CrossEntropyLoss(WEIGHTS), False),
    ],
)
def test_samples_that_weigh_alike_at_first_are_not_taken_for_all(loss: Any, whole: bool) -> None:
    y = torch.zeros(100, dtype=torch.int64)
    y[60:] = 1
    one = task(loss)
    try_own(one, from_torch((torch.zeros(100, 3), y)), SCORES)
    assert one.needs_whole_batch is whole


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), torch.tensor([0, 0, 0, 1, 1, 0])),
        (nn.NLLLoss(WEIGHTS), torch.tensor([0, 0, 0, 1, 1, 0])),
        (nn.CrossEntropyLoss(ignore_index=1), torch.tensor([1, 1, 0, 1, 0, 0])),
        (nn.CrossEntropyLoss(), torch.tensor([1, 1, 0, 1, 0, 0])),
    ],
)
def test_parts_of_pytorchs_own_means_weigh_what_they_are_means_over(loss: nn.Module, targets: Tensor) -> None:
    one, parts = task(loss), [slice(0, 2), slice(2, 4), slice(4, 6)]
    outputs = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    shares = one.shares(targets, parts, SCORES)
    pieces = [loss(outputs[part], targets[part]) * share for part, share in zip(parts, shares, strict=True) if share]
    assert float(sum(pieces)) == pytest.approx(float(loss(outputs, targets)), rel=1e-6)
    total = one.scores()
    for part in parts:
        scores = one.scores()
        scores.add((outputs[part],), targets[part])
        total.merge(scores)
    assert total.loss == pytest.approx(float(loss(outputs, targets)), rel=1e-6)


def test_a_loss_derived_from_pytorchs_is_not_taken_for_it() -> None:
    class Own(nn.CrossEntropyLoss):
        def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(scores, targets)

    assert task(Own(WEIGHTS)).shares(torch.tensor([0, 1]), [slice(0, 1), slice(1, 2)], SCORES) == [0.5, 0.5]

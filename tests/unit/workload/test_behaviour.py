"""Behaviour of layers in train mode: buffers that change, in place or by another one in their place."""

import pytest
import torch
from torch import nn

from helpers.small_networks import Averaged
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.workload.behaviour import Behaviour, behaviour_of


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(), Behaviour(changes_buffers=False, is_fixed=True)),
        (nn.Dropout(0.5), Behaviour(changes_buffers=False, is_fixed=False)),
        (nn.BatchNorm1d(4), Behaviour(changes_buffers=True, is_fixed=False)),
        (Averaged(4), Behaviour(changes_buffers=True, is_fixed=False)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_changes_of_buffers_and_draws_are_found(module: nn.Module, expected: Behaviour) -> None:
    chain = capture(nn.Sequential(nn.Linear(4, 4), module), TensorSpec((4,), torch.float32))
    assert behaviour_of(chain.layers[0], chain.boundaries[0]) == expected

"""Notes on a model: what is said of buffers that training changes and no file keeps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.networks import vector
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.workload.model_notes import model_notes


class Averages(nn.Module):
    """Takes off a running mean of what has come in, and has a buffer that stays as it is."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4), persistent=persistent)
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return (x - self.mean) * self.scale


@pytest.mark.parametrize("persistent", [True, False])
def test_what_training_changes_and_no_file_keeps_is_said(persistent: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Averages(persistent=persistent), nn.Linear(4, 4), nn.BatchNorm1d(4))
    workload: Any = SimpleNamespace(bare=capture(model, vector(4)))
    said = [
        "forwards change 1.mean, and no state_dict has it: whatever is done with the trained model has the constructor's values; register it "
        "with persistent=True"
    ]
    assert model_notes(workload) == ([] if persistent else said)

"""Activations that outweigh everything else: batches of them are never in memory as a whole where nothing learns from them."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers.plainloops import loaded

BATCH, CHANNELS, SIDE = 128, 64, 32


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * SIDE * SIDE, 4),
    )


@pytest.mark.parametrize("method", ["exact", "pnn"])
def test_the_smallest_budget_is_below_a_batch_of_them(method: str, tmp_path: Path) -> None:
    data = torch.rand(160, 3, SIDE, SIDE), torch.arange(160) % 4
    options = {"method": method, "batch_size": BATCH, "device": "cpu"}
    with pytest.raises(lowmem_pnn.BudgetError) as refused:
        lowmem_pnn.fit(convolutions, data, max_gpu_mem="3MB", workdir=tmp_path / "refused", val=data, **options)
    enough = refused.value.enough_bytes
    assert enough is not None
    assert enough < BATCH * CHANNELS * SIDE * SIDE * 4
    result = lowmem_pnn.fit(convolutions, data, max_gpu_mem=enough, epochs=1, workdir=tmp_path / "run", val=data, **options)
    assert result.peak_bytes <= enough
    with torch.no_grad():
        loss = nn.functional.cross_entropy(loaded(convolutions, result.weights_file)(data[0]), data[1])
    assert result.val_loss == pytest.approx(float(loss), rel=1e-5)

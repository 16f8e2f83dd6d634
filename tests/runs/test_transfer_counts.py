"""How often a step of `exact` asks the device's driver for something, on a simulated device; what is trained stays the same."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import lowmem_pnn
from helpers.simulated import train_on
from helpers.transfer_counts import CountingDevice
from lowmem_pnn.sweep.sweeper import Sweeper


def last_step(build: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], int]:
    """The counts of the last of three steps, and the number of layers."""
    device = CountingDevice(200_000_000)
    train_on(device, monkeypatch)
    steps: list[Counter[str]] = []
    train = Sweeper.train_batch

    def counted(self: Sweeper, *args: Any, **options: Any) -> float:
        before = Counter(device.counts)
        loss = train(self, *args, **options)
        self.finish_writes()
        steps.append(device.counts - before)
        return loss

    monkeypatch.setattr(Sweeper, "train_batch", counted)
    result = lowmem_pnn.fit(
        build, data, max_gpu_mem=device.budget_bytes, method="exact", batch_size=8, epochs=1, val_fraction=0, compare=False,
        partitions=4, micro_batch=4, workdir=tmp_path / "run",
    )  # fmt: skip
    assert len(steps) == 3
    assert len(result.partitions) == 4
    return steps[-1], sum(len(part["layers"]) for part in result.partitions)


GPT = "gpt:layers=12,width=32,heads=2,context=16"


def tokens() -> Any:
    drawn = torch.randint(0, 64, (24, 17), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def resnet() -> Any:
    return torchvision.models.resnet50(num_classes=4, width_per_group=4)


def images() -> Any:
    return torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4


@pytest.mark.parametrize(("build", "data"), [(GPT, tokens), (resnet, images)], ids=["gpt", "resnet50"])
def test_a_step_moves_each_layer_in_few_copies_and_waits_for_the_device_at_most_four_times(
    build: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a GPT of 12 layers, and ResNet-50, in 4 partitions, each batch in two micro-batches.

    Weights go up twice and come down once, optimizer state goes up and comes down, and so do buffers. What crosses a boundary comes down
    once and goes up twice, its gradient once each way, and so do, one way, the samples, twice, and the labels.
    """
    counts, layers = last_step(build, data(), tmp_path, monkeypatch)
    micro_batches, boundaries = 2, 3
    moved = micro_batches * (boundaries * (3 + 2) + 2 + 1)
    state = counts["ups"] + counts["downs"] - moved
    assert 4 * layers < state <= 7 * layers, "less would be a layer that is left out; more are layers larger than a pack"
    assert counts["drains"] <= 4
    assert counts["releases"] == 0

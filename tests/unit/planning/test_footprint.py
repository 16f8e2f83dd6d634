"""Device memory beside partitions: what is counted for shards, by the width of samples."""

import pytest
import torch
from torch import nn

from lowmem_pnn.config.configure import configure
from lowmem_pnn.device import CpuDevice
from lowmem_pnn.planning.footprint import Footprint
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.workload import make_workload, profile_workload
from lowmem_pnn.workload.inputs import python_inputs

BUDGET, CHANNELS, SIDE = 64_000_000, 64, 128
SAMPLE = 4 * CHANNELS * SIDE * SIDE


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, 4, 3, stride=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


@pytest.mark.parametrize(("method", "validates"), [("pnn", False), ("exact", True), ("exact", False), ("backprop", True)])
def test_two_shards_have_at_least_a_sample_each_where_any_are_written(method: str, validates: bool) -> None:
    data = torch.rand(4, 3, SIDE, SIDE), torch.arange(4)
    config = configure(
        max_gpu_mem=f"{BUDGET}B", model="python:images", data="python:tuple", device="cpu", method=method, batch_size=2,
        val_fraction=0.5 if validates else 0,
    )  # fmt: skip
    with CpuDevice(config.max_gpu_mem) as device:
        workload = make_workload(config, *python_inputs(images, data, None, None)(config), device.torch_device)
        footprint = Footprint.of(PlanRequest(workload, profile_workload(workload, device), device))
    widths = [sum(spec.sample_bytes for spec in specs) for specs in workload.chain.boundaries]
    wide, narrow = widths.index(SAMPLE), len(widths) - 2
    usual, writes = 2 * BUDGET // 64, method == "pnn" or (method == "exact" and validates)
    assert footprint.writes_shards == writes
    assert footprint.shard_bytes(narrow) == usual, "what has been pooled is narrow"
    assert footprint.shard_bytes(wide) >= 2 * SAMPLE > usual
    assert footprint.wide_shard_bytes(narrow) == 0
    # Above two usual shards, and the gradient of a sample, which is not there while they are written.
    assert footprint.wide_shard_bytes(wide) == (footprint.shard_bytes(wide) // 2 - usual if writes else 0)

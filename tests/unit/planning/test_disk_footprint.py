"""Disk space that a plan foresees."""

import torch
from torch import nn

from lowmem_pnn.config.configure import configure
from lowmem_pnn.device import CpuDevice
from lowmem_pnn.planning.disk_footprint import disk_bytes
from lowmem_pnn.planning.make_plan import make_plan
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.workload import make_workload, profile_workload
from lowmem_pnn.workload.inputs import python_inputs

WIDTH, TESTED = 256, 2000


def test_the_stores_of_a_test_lie_beside_the_export() -> None:
    config = configure(
        max_gpu_mem="100MB", model="python:mlp", data="python:tuple", device="cpu", method="pnn", batch_size=4, val_fraction=0,
        cuts="1,2,3,4,5", optimizer="sgd", momentum=0,
    )  # fmt: skip

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(4)), nn.Linear(WIDTH, 2))

    def data(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(samples, 4), torch.arange(samples) % 2

    with CpuDevice(config.max_gpu_mem) as device:
        inputs = python_inputs(build, data(8), None, data(TESTED))(config)
        workload = make_workload(config, *inputs, device.torch_device)
        costs = profile_workload(workload, device)
        found = disk_bytes(workload, make_plan(PlanRequest(workload, costs, device), lambda plan: 0.0), costs)
    weights = 4 * sum(parameter.numel() for parameter in build().parameters())
    inputs_and_outputs = TESTED * 2 * (4 * WIDTH + 8)  # of a partition, with the labels
    assert 0 <= found - (2 * weights + inputs_and_outputs) < 150_000, "the run's weights and the export, and headers"

"""The smallest budget that an error names."""

import pytest
import torch
from torch import nn

from helpers.gpu_driver import MB, Driver
from lowmem_pnn.config.configure import configure
from lowmem_pnn.device import CudaDevice
from lowmem_pnn.errors import BudgetError
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.make_plan import make_plan
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.workload import make_workload, profile_workload
from lowmem_pnn.workload.inputs import python_inputs


def _planned(budget: int) -> Plan:
    config = configure(
        max_gpu_mem=budget, model="python:linear", data="python:tuple", device="cuda", budget_scope="allocator", method="exact",
        batch_size=4, val_fraction=0,
    )  # fmt: skip
    data = torch.rand(8, 3), torch.arange(8) % 2
    inputs = python_inputs(lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), data, None, None)(config)
    with CudaDevice(budget, scope="allocator", driver=Driver()) as device:
        device.torch_device = torch.device("cpu")  # on which its layers can be priced without a GPU
        workload = make_workload(config, *inputs, device.torch_device)
        return make_plan(PlanRequest(workload, profile_workload(workload, device), device))


@pytest.mark.parametrize("budget", [2 * MB, 30 * MB])
def test_a_budget_below_what_is_kept_free_of_an_allocator_is_told_what_would_be_enough(budget: int) -> None:
    with pytest.raises(BudgetError, match="--max-gpu-mem") as found:
        _planned(budget)
    assert found.value.enough_bytes is not None
    assert _planned(found.value.enough_bytes).partitions

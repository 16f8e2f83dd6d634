"""Plans of models with a layer that is wider than all others: what the smallest budget is made of."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.config.configure import configure
from lowmem_pnn.device import CpuDevice
from lowmem_pnn.errors import BudgetError
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.make_plan import make_plan
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.workload import make_workload, profile_workload
from lowmem_pnn.workload.inputs import python_inputs

WORDS, WIDTH = 6000, 256
HEAD_BYTES = 4 * WORDS * WIDTH


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrix products hold memory for each thread, of which the figures here have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Words(nn.Module):
    """A vocabulary that outweighs what is between its embedding and its head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(self.embedding(x)))
        return scores


def planned(tied: bool, budget: int, **options: Any) -> Plan:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, WORDS, (16, 5), generator=generator)
    given = {"model": "python:words", "data": "python:tuple", "device": "cpu", "val_fraction": 0, "batch_size": 4}
    asked = configure(max_gpu_mem=f"{budget}B", **{**given, "optimizer": "adamw", **options})
    with CpuDevice(asked.max_gpu_mem) as device:
        inputs = python_inputs(functools.partial(Words, tied), (ids[:, :-1], ids[:, 1:]), None, None)(asked)
        workload = make_workload(asked, *inputs, device.torch_device)
        return make_plan(PlanRequest(workload, profile_workload(workload, device), device))


def smallest_budget(tied: bool, **options: Any) -> int:
    with pytest.raises(BudgetError, match="--max-gpu-mem") as found:
        planned(tied, 12_000_000, **options)
    enough = found.value.enough_bytes
    assert enough is not None
    assert f"--max-gpu-mem {enough // 10**6}MB" in str(found.value)
    return enough


@pytest.mark.parametrize("tied", [True, False])
def test_exact_needs_no_more_than_backprop_and_names_a_budget_that_does(tied: bool) -> None:
    enough = smallest_budget(tied, method="exact")
    planned(tied, enough, method="exact")
    # Weights and their gradient; not the optimizer's state, nor what the other layer has left of the gradient, nor streams of all that.
    assert enough < 2 * HEAD_BYTES + 18_000_000
    assert enough < smallest_budget(tied, method="backprop")
    assert enough < smallest_budget(tied, method="backprop", optimizer="sgd", momentum=0.0)


def test_a_tied_weight_is_counted_once_in_a_partition() -> None:
    num_params = sum(parameter.numel() for parameter in Words(tied=True).parameters())
    one = planned(True, 400_000_000, method="exact", partitions=1)
    assert [part.num_params for part in one.partitions] == [num_params]
    assert [part.state_bytes for part in one.partitions] == [16 * num_params]
    apart = planned(True, 400_000_000, method="exact", cuts="1,2")
    assert sum(part.num_params for part in apart.partitions) == num_params + WORDS * WIDTH

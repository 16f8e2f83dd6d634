"""Another device or budget than a run had: its options there, and its partitions, divided."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.inference import smaller_budget
from lowmem_pnn.inference.smaller_budget import options_here, within
from lowmem_pnn.model.call_form import TensorSpec
from lowmem_pnn.partition_plan import PartitionPlan, Plan

WIDTHS = (2, 300, 500, 4)


def trained(**options: object) -> FitConfig:
    return configure(max_gpu_mem="1GB", model="mlp:64-10", data="digits", method="exact", **options)


def test_what_a_gpu_alone_reads_is_left_out_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = trained(tf32=True, budget_scope="allocator", max_host_mem="2GB")
    monkeypatch.setattr(smaller_budget, "is_gpu", lambda device: device != "cpu")
    assert options_here(config, None, None) == config
    assert options_here(config, None, "cpu") == trained(device="cpu")
    assert options_here(trained(device="cuda:1"), None, None).device == "cuda:1", "which is refused, unless another is given"


def test_layers_run_as_they_are_where_the_compiler_may_be_missing() -> None:
    assert not options_here(trained(compile=True, device="cpu"), None, None).compile


def test_another_budget_is_a_size_and_another_device_is_one() -> None:
    assert options_here(trained(), "200MB", "cpu").max_gpu_mem == 200_000_000
    with pytest.raises(ConfigError, match=r"^--max-gpu-mem: 'much' is not a size"):
        options_here(trained(), "much", None)
    with pytest.raises(ConfigError, match=r"^--device 'gpu' is none of auto, cpu, cuda, cuda:INDEX; did you mean 'cuda'\?$"):
        options_here(trained(), None, "gpu")


def test_parts_read_samples_as_wide_as_they_are_at_their_own_cuts_and_in_pieces() -> None:
    modules = [nn.Linear(before, after, bias=False) for before, after in pairwise(WIDTHS)]
    layers = [
        SimpleNamespace(name=str(number), parameters=lambda one=one: dict(one.named_parameters()), buffers=dict)
        for number, one in enumerate(modules)
    ]
    chain = SimpleNamespace(layers=layers, boundaries=[(TensorSpec((width,), torch.float32),) for width in WIDTHS])
    part = PartitionPlan(0, 3, 8, 8, 10**7, 0, 0, 4 * WIDTHS[0], 4 * WIDTHS[-1], 0)
    plan = Plan((part,), 10**7, 0, 10**7, 1, whole_batches=True)
    divided = within(plan, cast(Any, SimpleNamespace(chain=chain)), 1_000_000)
    assert [(one.start, one.stop) for one in divided.partitions] == [(0, 1), (1, 2), (2, 3)]
    assert [one.input_bytes_per_sample for one in divided.partitions] == [8, 1200, 2000]
    assert [one.output_bytes_per_sample for one in divided.partitions] == [1200, 2000, 16]
    assert not divided.whole_batches
    assert within(plan, cast(Any, SimpleNamespace(chain=chain)), 10**7) is plan

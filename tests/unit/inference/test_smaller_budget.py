"""A run's partitions, divided for a smaller budget, or joined where they fit."""

import dataclasses
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from lowmem_pnn.inference.smaller_budget import in_one_partition, within
from lowmem_pnn.model.call_form import TensorSpec
from lowmem_pnn.partition_plan import PartitionPlan, Plan

WIDTHS = (2, 300, 500, 4)


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
    # Joined again, it reads as wide as the model does, with the smallest micro-batch of its parts.
    smaller = dataclasses.replace(divided.partitions[1], micro_batch=2)
    parts = dataclasses.replace(divided, partitions=(divided.partitions[0], smaller, divided.partitions[2]))
    [whole] = in_one_partition(parts, cast(Any, SimpleNamespace(chain=chain))).partitions
    assert (whole.start, whole.stop, whole.micro_batch) == (0, 3, 2)
    assert (whole.input_bytes_per_sample, whole.output_bytes_per_sample) == (8, 16)

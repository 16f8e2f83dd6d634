"""The program of a workload: which partitions it visits where some layers are frozen."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from lowmem_pnn.config.configure import configure, for_method
from lowmem_pnn.methods import Sweep, Visit
from lowmem_pnn.methods.macs import samples_learnt
from lowmem_pnn.workload import Workload, by_other_method, make_workload
from lowmem_pnn.workload.inputs import python_inputs

DATA = torch.rand(20, 6), torch.arange(20) % 3
SPANS = [(0, 1), (1, 2), (2, 3)]


def build(frozen: str = "") -> nn.Module:
    """Three layers, of which the model's own code freezes some."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    for number in frozen:
        model[int(number)].requires_grad_(False)
    return model


def workload(frozen: str = "", **options: Any) -> Workload:
    config = configure(
        max_gpu_mem="100MB", model="python:net", data="python:table", device="cpu", **{"method": "exact", **options}
    )
    return make_workload(config, *python_inputs(lambda: build(frozen), DATA, DATA, DATA)(config), torch.device("cpu"))


def described(items: list[Visit | Sweep]) -> list[Any]:
    """Of each item what is done; of a sweep its first partition, those that learn, and its epochs."""
    return [
        (item.first, item.learners, item.epochs) if isinstance(item, Sweep) else (item.action, item.partition) for item in items
    ]


def test_what_is_unfrozen_learns_beside_what_the_models_code_freezes() -> None:
    made = workload("0", freeze="1.*", unfreeze_at=2, epochs=5)
    assert described(made.program(SPANS)) == [("emit", 0), ("emit", 1), (2, (2,), 2), (0, (1, 2), 3)]
    assert made.fixed_layers == 2, "which a plan counts"
    # Of a partition that holds both.
    assert described(made.program([(0, 2), (2, 3)])) == [("emit", 0), (1, (1,), 2), (0, (0, 1), 3)]
    all_learn = workload(freeze="[01].*", unfreeze_at=2, epochs=5)
    assert described(all_learn.program(SPANS)) == [("emit", 0), ("emit", 1), (2, (2,), 2), (0, (0, 1, 2), 3)]


def test_backprop_is_frozen_and_unfrozen_in_two_visits() -> None:
    items = workload(method="backprop", freeze="[01].*", unfreeze_at=2, epochs=5).program([(0, 3)])
    assert [(item.epochs, item.epochs_before, item.frozen) for item in items] == [(2, 0, True), (3, 2, False)]


def test_another_method_has_its_own_frozen_epochs() -> None:
    asked = workload("0", freeze="1.*", unfreeze_at=2, epochs=5)
    other = by_other_method(asked, for_method(asked.config, "backprop"))
    assert (asked.fixed_layers, other.fixed_layers) == (2, 0)
    assert by_other_method(other, for_method(other.config, "exact")).fixed_layers == 2


@pytest.mark.parametrize("method", ["pnn", "neuroflux"])
def test_a_partition_in_which_nothing_learns_has_no_epochs(method: str) -> None:
    # The layers before the last have heads, which learn.
    frozen = "[01].*" if method == "pnn" else "2.*"
    made = workload(method=method, freeze=frozen, epochs=3)
    spans = [(0, 2), (2, 3)]
    items = made.program(spans)
    learning = [(item.partition, item.epochs) for item in items if isinstance(item, Visit) and item.action == "learn"]
    assert learning == ([(0, 0), (1, 3)] if method == "pnn" else [(0, 3), (1, 0)])
    whole = workload(method=method, epochs=3).program(spans)
    assert [dataclasses.replace(item, epochs=1) for item in items] == [dataclasses.replace(item, epochs=1) for item in whole]
    samples = len(made.splits["train"])
    assert samples_learnt(items, samples) == 3 * samples == samples_learnt(whole, samples) / 2

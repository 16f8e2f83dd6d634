"""Fixtures of whole runs: a model that one run has cut and measured is cut and measured for all, and all weights and state move."""

from collections.abc import Hashable, Iterator
from typing import Any

import pytest
import torch

from helpers.equal_models import cut_once
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning import batch_plan
from lowmem_pnn.profiling.fake_run import FakeRun, LayerMeasurement
from lowmem_pnn.profiling.fingerprint import layer_fingerprint

# With the layers, since keys hold identities of what is theirs.
_measured: dict[Hashable, tuple[LayerMeasurement, Layer]] = {}


@pytest.fixture(scope="module", autouse=True)
def _equal_layers_are_measured_once() -> Iterator[None]:
    """Keep measurements from run to run, as a run keeps them from method to method: else they are two thirds of a small run's time."""
    measure = FakeRun.measure

    def measure_once(run: FakeRun) -> LayerMeasurement:
        layer = run._layer
        uses = layer.compiled, run.before, run.after, run._device, run._learns_input, torch.get_num_threads()
        key = layer_fingerprint(layer), uses
        if key not in _measured:
            _measured[key] = measure(run), layer
        return _measured[key][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeRun, "measure", measure_once)
        yield


@pytest.fixture(scope="module", autouse=True)
def _equal_models_are_cut_once() -> Iterator[None]:
    """Keep the layers of models from run to run: cutting them is half of what a small run takes that is measured already."""
    with cut_once():
        yield


@pytest.fixture(autouse=True)
def _all_of_it_moves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have sweeps move all weights and state, as under a tight budget, but in tests and cases that are marked `resident`.

    Budgets of small networks have room for all of it, and what these tests are about would not be done. Where it may stay, something has to.
    """
    if request.node.get_closest_marker("resident") is None:
        monkeypatch.setattr(batch_plan, "with_resident_state", lambda request, plan: plan)
        yield
        return
    with_resident_state, sizes = batch_plan.with_resident_state, []

    def noted(request: Any, plan: Plan) -> Plan:
        plan = with_resident_state(request, plan)
        sizes.append(plan.resident_bytes)
        return plan

    monkeypatch.setattr(batch_plan, "with_resident_state", noted)
    yield
    assert any(sizes) or batch_plan.with_resident_state is not noted, "nothing stayed in memory"

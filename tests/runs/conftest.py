"""Fixtures of whole runs: a layer that one run has measured, and a model that one has run, are known to all; all weights and state move."""

from collections.abc import Hashable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lowmem_pnn.capture import capture
from lowmem_pnn.capture.equal_blocks import module_key
from lowmem_pnn.capture.fake_model import ModelRun, run_model
from lowmem_pnn.capture.setting import Setting
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning import batch_plan
from lowmem_pnn.profiling.fake_run import FakeRun, LayerMeasurement
from lowmem_pnn.profiling.fingerprint import lasts, layer_fingerprint

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


# Classes that hold no state of their own; tests' own classes may.
_STATELESS = {"torch", "torchvision", "timm", "lowmem_pnn", "helpers"}
_ran: dict[Hashable, ModelRun] = {}


def _key_of(model: nn.Module, setting: Setting) -> Hashable:
    """A key of what a model does on fake tensors; None where nothing is known to decide it."""
    modules = list(model.modules())
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if any(type(module).__module__.partition(".")[0] not in _STATELESS for module in modules):
        return None
    if any(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None) for _, tensor in names):
        return None
    first: dict[int, int] = {}
    ties = tuple(first.setdefault(id(tensor), index) for index, (_, tensor) in enumerate(names))
    shared = tuple(
        first.setdefault(id(module), index) for index, (_, module) in enumerate(model.named_modules(remove_duplicate=False))
    )
    devices = tuple(tensor.device.type for _, tensor in names)
    modes = tuple(module.training for module in modules)
    key = module_key(model), ties, shared, devices, modes, repr(setting), torch.get_default_dtype()
    return key if lasts(key) else None


@pytest.fixture(scope="module", autouse=True)
def _equal_models_are_run_once() -> Iterator[None]:
    """Keep what models do on fake tensors from run to run: nearly half of the time of looking for cuts, which is half of a small run's."""

    def run_once(model: nn.Module, setting: Setting) -> ModelRun:
        key = _key_of(model, setting)
        if key is None:
            return run_model(model, setting)
        if key not in _ran:
            _ran[key] = run_model(model, setting)
        return _ran[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "run_model", run_once)
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

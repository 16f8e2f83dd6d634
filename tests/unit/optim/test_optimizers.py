"""Optimizers: PyTorch's own, with state that may live in a file between any two steps."""

import pytest
import torch
from torch import Tensor, nn

from helpers.plainloops import OPTIMIZERS
from lowmem_pnn.memory.storage_tracker import StorageTracker
from lowmem_pnn.optim.optimizers import OptimizerSpec

SPECS = [
    OptimizerSpec(name, lr=0.05, momentum=momentum, weight_decay=decay, fused=fused)
    for name, momentum in (("sgd", 0.0), ("sgd", 0.9), ("adam", 0.9), ("adamw", 0.9))
    for decay in (0.0, 0.1)
    for fused in (True, False)
]
NAMES = [f"{spec.name}-{spec.momentum:g}-{spec.weight_decay:g}-{'fused' if spec.fused else 'loops'}" for spec in SPECS]


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(4)
    return {
        "large": nn.Parameter(torch.randn(50, 20, generator=generator)),
        "small": nn.Parameter(torch.randn(7, generator=generator)),
        "one": nn.Parameter(torch.randn((), generator=generator)),
    }


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def zeros(spec: OptimizerSpec, parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {state: torch.zeros(shape, dtype=dtype) for state, (dtype, shape) in spec.layout(parameter).items()}
        for name, parameter in parameters.items()
    }


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_state_that_was_put_away_after_every_step_is_same_as_an_optimizer_that_stays(spec: OptimizerSpec) -> None:
    plain = parameters()
    settings = {"lr": 0.05, "weight_decay": spec.weight_decay, **({"momentum": spec.momentum} if spec.name == "sgd" else {})}
    extra = {"fused": True} if spec.fused else {"foreach": False}
    reference = OPTIMIZERS[spec.name](plain.values(), **settings, **extra)
    ours = parameters()
    state = zeros(spec, ours)
    for step in range(4):
        give_gradients(plain, step)
        reference.step()
        give_gradients(ours, step)
        spec.build(ours, state).step()
        # As a file does: new tensors of the same values.
        state = {name: {key: tensor.clone() for key, tensor in entries.items()} for name, entries in state.items()}
        assert all(torch.equal(ours[name], plain[name]) for name in plain)
    for name, parameter in plain.items():
        expected = {key: value for key, value in reference.state[parameter].items() if value is not None}
        assert set(state[name]) == set(expected)
        assert all(torch.equal(state[name][key], value) for key, value in expected.items())


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_a_step_allocates_what_was_foreseen(spec: OptimizerSpec) -> None:
    ours = parameters()
    optimizer = spec.build(ours, zeros(spec, ours))
    for step in range(2):
        give_gradients(ours, step)
        with StorageTracker() as tracker:
            optimizer.step()
        largest = max(parameter.nbytes for parameter in ours.values())
        # Scalars, as Adam's bias corrections, come on top.
        assert spec.step_temporaries * largest <= tracker.peak <= spec.step_temporaries * largest + 100
        assert tracker.live == 0, "the state that was given is updated in place"


def test_state_names_are_those_of_a_parameters_shape() -> None:
    for spec in SPECS:
        layout = spec.layout(torch.empty(3, 4, device="meta"))
        assert spec.state_names == tuple(name for name, (_, shape) in layout.items() if shape == (3, 4))

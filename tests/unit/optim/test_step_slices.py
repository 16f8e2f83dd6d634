"""Steps by slices: the bits of steps as a whole, for every optimizer, format of state and number of threads."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from helpers.quantized_state import give_gradients, parameters, zeros
from lowmem_pnn.optim.optimizers import COUNT, OptimizerSpec, SlicedParameter
from lowmem_pnn.optim.step_slices import SLICE_UNIT, state_elements, step_slices

# Three slices, the last one too small to be quantized by itself, and of an odd number of elements.
SHAPES = [(2 * SLICE_UNIT // 64, 64), (2 * SLICE_UNIT + 1003,), (300,)]
SPECS = {
    "adamw": OptimizerSpec("adamw", lr=0.05, weight_decay=0.1),
    "adamw-loops": OptimizerSpec("adamw", lr=0.05, weight_decay=0.1, fused=False),
    "adam-loops": OptimizerSpec("adam", lr=0.05, weight_decay=0.1, fused=False),
    "sgd": OptimizerSpec("sgd", lr=0.05, momentum=0.8, weight_decay=0.1),
    "sgd-loops": OptimizerSpec("sgd", lr=0.05, momentum=0.8, weight_decay=0.1, fused=False),
    "bf16": OptimizerSpec("adamw", lr=0.05, state="bf16", seed=3),
    "int8": OptimizerSpec("adam", lr=0.05, state="int8", seed=3),
}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def step_by_slices(spec: OptimizerSpec, own: dict[str, nn.Parameter], state: dict[str, dict[str, Tensor]]) -> None:
    sliced: dict[str, SlicedParameter] = {}
    counts = {name: tensors.get(COUNT) for name, tensors in state.items()}
    for parts in step_slices(own, SLICE_UNIT):
        for part in parts:
            whole = own[part.name]
            assert whole.grad is not None
            piece = nn.Parameter(whole.detach().view(-1)[part.elements])
            piece.grad = whole.grad.view(-1)[part.elements]
            elements = state_elements(spec, whole, part)
            values = {name: state[part.name][name].view(-1)[where] for name, where in elements.items() if where is not None}
            count = counts[part.name]
            if count is not None:
                values[COUNT] = count.clone()
            key = sliced.setdefault(part.name, SlicedParameter(whole))
            spec.build({part.name: piece}, {part.name: values}, key).step()
            if part.is_last and count is not None:
                state[part.name][COUNT] = values[COUNT]


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.usefixtures("threads")
def test_steps_by_slices_are_same_as_steps_as_a_whole(kind: str) -> None:
    if kind == "int8":
        pytest.importorskip("torchao")
    spec = SPECS[kind]
    wholes, slices = parameters(*SHAPES), parameters(*SHAPES)
    of_wholes, of_slices = zeros(spec, wholes), zeros(spec, slices)
    for step in range(2):
        give_gradients(wholes, step)
        give_gradients(slices, step)
        spec.build(wholes, of_wholes).step()
        step_by_slices(spec, slices, of_slices)
    for name, parameter in wholes.items():
        assert torch.equal(parameter, slices[name]), name
        for key, tensor in of_wholes[name].items():
            assert torch.equal(tensor, of_slices[name][key]), f"{name} {key}"

"""Weights in bfloat16: a step of PyTorch's own in float32, rounded at random by a seed, however the weight is sliced."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.optim.low_precision import Bfloat16, pieces
from lowmem_pnn.optim.optimizers import COUNT, OptimizerSpec, SlicedParameter
from lowmem_pnn.seeds import seed_of

SIZE = 70_000


def fresh(spec: OptimizerSpec, parameter: Tensor) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in spec.layout(parameter).items()}


def weights() -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).bfloat16()


def gradients(step: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(10 + step)).bfloat16()


def stepped(spec: OptimizerSpec, steps: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    parameter = nn.Parameter(weights())
    state = {"w": fresh(spec, parameter)}
    for step in range(steps):
        parameter.grad = gradients(step)
        optimizer = spec.build({"w": parameter}, state)
        optimizer.step()
    return parameter.detach(), state["w"]


def test_a_step_is_adamw_in_float32_and_rounded() -> None:
    spec = OptimizerSpec("adamw", lr=1e-3, weight_decay=0.1, weights="bf16", seed=4)
    found, state = stepped(spec)
    expected, moments = weights(), None
    for step in range(3):
        whole = nn.Parameter(expected.float())
        whole.grad = gradients(step).float()
        plain = torch.optim.AdamW([whole], lr=1e-3, weight_decay=0.1, fused=True)
        if moments is not None:
            plain.state[whole] = moments
        plain.step()
        moments = plain.state[whole]
        generator = torch.Generator().manual_seed(seed_of(4, "rounding", "w", step + 1))
        for piece in pieces(SIZE):
            Bfloat16("w", signed=True).quantize({"w": expected}, piece, whole.detach()[piece].clone(), generator)
    assert torch.equal(found, expected)
    assert moments is not None
    assert torch.equal(state["exp_avg"], moments["exp_avg"])
    assert (state["exp_avg"].dtype, int(state[COUNT])) == (torch.float32, 3)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_slices_give_the_bits_of_the_whole(kind: Any) -> None:
    spec = OptimizerSpec("adamw", lr=1e-3, weights="bf16", state=kind, seed=4)
    whole, _ = stepped(spec, 1)
    parameter = weights()
    state = fresh(spec, parameter)
    sliced, count = SlicedParameter(parameter), state[COUNT].clone()
    for begin in (0, 65_536):
        part = slice(begin, min(begin + 65_536, SIZE))
        own = nn.Parameter(parameter[part])
        own.grad = gradients(0)[part]
        views = {name: tensor[part] for name, tensor in state.items() if name != COUNT}
        spec.build({"w": own}, {"w": {**views, COUNT: count.clone()}}, sliced).step()
    assert torch.equal(parameter, whole)


def test_steps_below_the_precision_are_not_lost() -> None:
    spec = OptimizerSpec("adam", lr=1e-5, weights="bf16")
    parameter = nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16))
    state = {"w": fresh(spec, parameter)}
    for _ in range(50):
        parameter.grad = torch.ones_like(parameter)
        spec.build({"w": parameter}, state).step()
    # 1 - 50 * 1e-5, though neighbours of 1 are 0.004 apart.
    assert abs(float(parameter.detach().double().mean()) - 0.9995) < 2e-5
    assert spec.layout(parameter)["exp_avg"] == (torch.float32, (SIZE,))
    assert str(spec) == "adam with weights in bf16"

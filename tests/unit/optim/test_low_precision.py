"""Quantized optimizer state: its precision, and that training with it is the same wherever the model is cut, stopped and resumed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.optim.subclass_8bit import OptimState8bit

from helpers import plainloops
from helpers.plainloops import make_optimizer
from helpers.quantized_state import PARAMETER_SHAPES, dequantized, give_gradients, numbers, parameters, quantized, zeros
from lowmem_pnn.config.configure import configure
from lowmem_pnn.memory.storage_tracker import StorageTracker
from lowmem_pnn.optim import low_precision
from lowmem_pnn.optim.low_precision import (
    BLOCK_SIZE,
    GPU_PIECE_SIZE,
    MIN_QUANTIZED_SIZE,
    PIECE_SIZE,
    Bfloat16,
    Int8,
    is_quantized,
    piece_size,
    pieces,
)  # fmt: skip
from lowmem_pnn.optim.optimizers import OptimizerSpec

SIZES = [
    MIN_QUANTIZED_SIZE,
    MIN_QUANTIZED_SIZE + 1,
    20 * BLOCK_SIZE - 1,
    PIECE_SIZE,
    PIECE_SIZE + 3 * BLOCK_SIZE + 7,
    2 * PIECE_SIZE,
]


# Codes.


@given(size=st.integers(1, 3 * PIECE_SIZE))
def test_pieces_cover_all_and_are_whole_blocks_but_for_the_last(size: int) -> None:
    found = list(pieces(size))
    assert [piece.start for piece in found] == [0, *(piece.stop for piece in found[:-1])]
    assert found[-1].stop == size
    assert all((piece.stop - piece.start) % BLOCK_SIZE == 0 for piece in found if piece.stop != size or size % BLOCK_SIZE == 0)
    assert all(0 < piece.stop - piece.start <= PIECE_SIZE for piece in found)


@settings(max_examples=40, deadline=None)
@given(blocks=st.integers(1, 300), seed=st.integers(0, 2**32), spread=st.floats(0, 6), signed=st.booleans())
def test_int8_is_same_as_torchao_but_that_no_square_becomes_zero(blocks: int, seed: int, spread: float, signed: bool) -> None:
    values = numbers(blocks * BLOCK_SIZE, seed, spread)
    values = values if signed else values.square()
    values[:3] = 0
    theirs = OptimState8bit.zeros(values.shape, signed=signed)
    theirs.copy_(values)
    codec = Int8("moment", signed)
    state = quantized(codec, values)
    assert torch.equal(state["moment.scale"], theirs.scale)
    expected = theirs.codes if signed else theirs.codes.maximum((values > 0).to(torch.uint8))
    assert torch.equal(state["moment.codes"], expected)
    if signed:
        assert torch.equal(dequantized(codec, state, len(values)), theirs.dequantize())


def test_int8_of_every_threshold_is_that_of_torchao() -> None:
    for signed in (True, False):
        levels = low_precision._int8_levels(signed, torch.device("cpu"))
        at = levels.thresholds[:-1]
        down, up = torch.nextafter(at, torch.tensor(-2.0)), torch.nextafter(at, torch.tensor(2.0))
        scaled = torch.cat([at, down, up, levels.values, torch.tensor([1.0, 0.0])])
        theirs = low_precision._torchao().quantize_8bit_with_qmap(scaled, levels.values)
        assert torch.equal(levels.quantize(scaled), theirs if signed else theirs.maximum((scaled > 0).to(torch.uint8)))
        # The first value above, not the last one below.
        assert torch.equal(levels.quantize(at).int() - levels.quantize(down).int(), torch.ones(len(at), dtype=torch.int32))


@settings(max_examples=25, deadline=None)
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**32), spread=st.floats(0, 4), signed=st.booleans())
def test_int8_keeps_the_nearest_level(size: int, seed: int, spread: float, signed: bool) -> None:
    values = numbers(size, seed, spread)
    values = values if signed else values.abs()
    codec = Int8("moment", signed)
    state = quantized(codec, values)
    found = dequantized(codec, state, size)
    scale = state["moment.scale"].repeat_interleave(BLOCK_SIZE)[:size]
    levels = torch.tensor(low_precision._torchao().create_dynamic_map(signed=signed), dtype=torch.float64)
    scaled = (values / scale).double()
    above = torch.searchsorted(levels, scaled).clamp(1, 255)
    nearest = torch.minimum((scaled - levels[above - 1]).abs(), (scaled - levels[above]).abs())
    error = ((found / scale).double() - scaled).abs()
    lowest = 0.0 if signed else float(levels[1])  # instead of zero
    assert (error <= torch.clamp(nearest, min=lowest) + 1e-6).all()
    if not signed:
        assert torch.equal(found == 0, values == 0)
        assert torch.equal(found.max(), values.max()), "the largest of a block is its scale"


def test_a_last_block_that_is_not_whole_is_same_as_one_with_zeros_behind() -> None:
    values = numbers(MIN_QUANTIZED_SIZE + 100, 0, 2.0)
    whole = torch.cat([values, torch.zeros(BLOCK_SIZE - 100)])
    ours, padded = quantized(Int8("m", True), values), quantized(Int8("m", True), whole)
    assert torch.equal(ours["m.scale"], padded["m.scale"])
    assert torch.equal(ours["m.codes"], padded["m.codes"][: len(values)])


@settings(max_examples=25, deadline=None)
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**32), spread=st.floats(0, 20))
def test_bf16_keeps_one_of_two_neighbours(size: int, seed: int, spread: float) -> None:
    values = numbers(size, seed, spread)
    values[:4] = torch.tensor([0.0, 1.0, -2.5, 2.0**-20])
    state = quantized(Bfloat16("moment", True), values, seed)["moment"]
    assert state.dtype == torch.bfloat16
    assert state[:4].tolist() == values[:4].tolist()
    towards = (values.view(torch.int32) & -0x10000).view(torch.float32)
    away = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    found = state.float()
    assert ((found == towards) | ((found == away) & (values != towards))).all()


def test_bf16_is_right_in_the_mean_and_follows_from_its_seed() -> None:
    values = torch.tensor([1.0 + 2**-10, -3.3, 1e-20, 7.77]).repeat_interleave(1 << 15)
    found = quantized(Bfloat16("moment", True), values, seed=5)["moment"]
    for own, exact in zip(found.float().double().view(4, -1), values.view(4, -1)[:, 0].double(), strict=True):
        step = float(own.max() - own.min())
        assert step > 0
        assert abs(float(own.mean() - exact)) < 5 * step / 2 / math.sqrt(own.numel())
    assert torch.equal(found, quantized(Bfloat16("moment", True), values, seed=5)["moment"])
    assert not torch.equal(found, quantized(Bfloat16("moment", True), values, seed=6)["moment"])


# A step.


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "loops"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_steps_with_int8_are_same_as_plain_pytorch_with_state_that_torchao_has_quantized(name: str, fused: bool) -> None:
    spec = OptimizerSpec(name, lr=0.05, weight_decay=0.1, fused=fused, state="int8")  # type: ignore[arg-type]
    shapes = [(64, 64), (17,), (), (300, 256), (PIECE_SIZE // 64 + 4, 64)]
    ours, plain = parameters(*shapes), parameters(*shapes)
    reference = plainloops.OPTIMIZERS[name](plain.values(), lr=0.05, weight_decay=0.1, fused=fused, foreach=False)
    state = zeros(spec, ours)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(plain, step)
        spec.build(ours, state).step()
        reference.step()
        for parameter in plain.values():
            if parameter.numel() >= 4096:
                for moment, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                    values = reference.state[parameter][moment]
                    quantized = OptimState8bit.zeros(values.shape, signed=signed)
                    quantized.copy_(values)
                    if not signed:
                        quantized.codes.copy_(quantized.codes.maximum((values > 0).to(torch.uint8)))
                    values.copy_(quantized.dequantize())
        assert all(torch.equal(ours[key], plain[key]) for key in plain)
        assert all(float(state[key]["step"]) == step + 1 for key in state)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_steps_of_one_parameter_at_a_time_are_same_as_of_all_together(kind: Any) -> None:
    spec = OptimizerSpec("adamw", lr=0.05, state=kind, seed=7)
    ours, others = parameters(*PARAMETER_SHAPES), parameters(*PARAMETER_SHAPES)
    state, other_state = zeros(spec, ours), zeros(spec, others)
    optimizer = spec.build(ours, state)
    torch.manual_seed(1)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(others, step)
        optimizer.step()
        for name in reversed(others):
            # As after a file: other tensors of the same values.
            other_state[name] = {key: tensor.clone() for key, tensor in other_state[name].items()}
            spec.build({name: others[name]}, other_state).step()
            others[name].grad = None
    for name in ours:
        assert torch.equal(ours[name], others[name])
        assert all(torch.equal(tensor, other_state[name][key]) for key, tensor in state[name].items())
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(1)), (
        "chance is drawn from a generator of its own"
    )


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_parameter_without_a_gradient_stays(kind: Any) -> None:
    spec = OptimizerSpec("adam", state=kind)
    ours = parameters((64, 64), (64, 64))
    before = ours["p1"].detach().clone()
    state = zeros(spec, ours)
    ours["p0"].grad = torch.ones(64, 64)
    spec.build(ours, state).step()
    assert torch.equal(ours["p1"], before)
    assert float(state["p1"]["step"]) == 0


def test_squares_in_bf16_follow_where_rounding_to_the_nearest_would_stand_still() -> None:
    spec = OptimizerSpec("adam", lr=0.0, state="bf16")
    ours = parameters((64, 64))
    state = zeros(spec, ours)
    state["p0"]["exp_avg_sq"].fill_(1.0)
    ours["p0"].grad = torch.full((64, 64), math.sqrt(2.0))
    optimizer = spec.build(ours, state)
    for _ in range(100):
        optimizer.step()
    exact = 2 - 0.999**100  # 1.095
    assert float(state["p0"]["exp_avg_sq"].float().mean()) == pytest.approx(exact, abs=2e-3)
    assert torch.tensor(1.001, dtype=torch.bfloat16) == 1.0


def test_an_input_that_is_seldom_on_moves_its_weights_with_int8_as_little_as_without() -> None:
    reach = {}
    for kind in ("fp32", "int8"):
        spec = OptimizerSpec("adamw", lr=1e-3, state=kind)  # type: ignore[arg-type]
        model = nn.Linear(256, 64)
        with torch.no_grad():
            model.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        ours = dict(model.named_parameters())
        optimizer = spec.build(ours, zeros(spec, ours))
        generator = torch.Generator().manual_seed(1)
        for step in range(300):
            x = torch.randn(32, 256, generator=generator)
            x[:, 0] = 0
            if step == 50:
                x[0, 0] = 0.01
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        reach[kind] = float(model.weight[:, 0].detach().abs().max())
    assert reach["int8"] < 1.5 * reach["fp32"]  # with torchao's codes as they are: ten times


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "loops"])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("shape", [(64, 64), (PIECE_SIZE + 100,), (4 * PIECE_SIZE,)])
def test_a_step_allocates_what_was_foreseen(kind: Any, fused: bool, shape: tuple[int, ...]) -> None:
    low_precision.load_int8_levels()
    spec = OptimizerSpec("adam", weight_decay=0.1, fused=fused, state=kind)
    ours = parameters(shape)
    optimizer = spec.build(ours, zeros(spec, ours))
    for step in range(2):
        give_gradients(ours, step)
        with StorageTracker() as tracker:
            optimizer.step()
        assert tracker.live == 0, "the state that was given is updated in place"
        foreseen = spec.step_bytes(ours["p0"])
        assert 0.75 * foreseen <= tracker.peak <= foreseen + 100


def test_the_state_of_small_and_of_other_parameters_stays_as_it_is() -> None:
    for kind, num_bytes in (("bf16", 4.0), ("int8", 2 + 8 / BLOCK_SIZE)):
        spec = OptimizerSpec("adamw", state=kind)  # type: ignore[arg-type]
        large, small = torch.empty(64, 64, device="meta"), torch.empty(63, 65, device="meta")
        assert is_quantized(large)
        assert spec.state_bytes(large) == num_bytes * 4096
        for other in (small, large.to(torch.bfloat16), large.double()):
            assert not is_quantized(other)
            assert spec.layout(other) == OptimizerSpec("adamw").layout(other)
            assert spec.state_bytes(other) == 2 * other.nbytes
    assert OptimizerSpec("adamw", state="int8").layout(torch.empty(65, 65)) == {
        "exp_avg.codes": (torch.uint8, (65, 65)), "exp_avg.scale": (torch.float32, (17,)),
        "exp_avg_sq.codes": (torch.uint8, (65, 65)), "exp_avg_sq.scale": (torch.float32, (17,)),
        "step": (torch.float32, ()),
    }  # fmt: skip


# Training.


def test_another_seed_rounds_otherwise(tmp_path: Path) -> None:
    spec, other = (OptimizerSpec("adam", state="bf16", seed=seed) for seed in (0, 1))
    found = []
    for own in (spec, other):
        ours = parameters((64, 64))
        state = zeros(own, ours)
        give_gradients(ours, 0)
        own.build(ours, state).step()
        found.append(state["p0"]["exp_avg"])
    assert not torch.equal(*found)


# Refusals.


def test_state_in_fp32_is_pytorchs_own_optimizer() -> None:
    config = configure(max_gpu_mem="1GB", model="python:m", data="python:d", optimizer="adamw")
    ours = parameters((64, 64))
    built = OptimizerSpec("adamw").build(ours, zeros(OptimizerSpec("adamw"), ours))
    assert type(built) is type(make_optimizer(config, 0, list(ours.values()))) is torch.optim.AdamW


def test_on_a_gpu_pieces_are_as_large_as_a_step_slice_and_plans_know() -> None:
    parameter = torch.empty(3000, 3000, device="meta")
    spec = OptimizerSpec("adamw", state="int8")
    cpu, gpu = (spec.step_bytes(parameter, None, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert gpu / cpu == pytest.approx(GPU_PIECE_SIZE / PIECE_SIZE, rel=1e-6)
    assert spec.step_bytes(parameter, PIECE_SIZE, torch.device("cuda")) == cpu
    assert [piece.stop - piece.start for piece in pieces(GPU_PIECE_SIZE + 300, piece_size(torch.device("cuda", 1)))] == [
        GPU_PIECE_SIZE, 256, 44,
    ]  # fmt: skip

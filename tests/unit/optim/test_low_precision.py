"""Quantized optimizer state: its precision, and that training with it is the same wherever the model is cut, stopped and resumed."""

import builtins
import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao.optim.subclass_8bit import OptimState8bit

import lowmem_pnn
from helpers import plainloops
from helpers.plainloops import assert_same_weights, loaded, make_optimizer, train_by_backprop, train_by_exact
from helpers.small_networks import Data, vectors
from lowmem_pnn import api as trainer
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.memory.storage_tracker import StorageTracker
from lowmem_pnn.optim import low_precision
from lowmem_pnn.optim.low_precision import BLOCK_SIZE, MIN_QUANTIZED_SIZE, PIECE_SIZE, Bfloat16, Codec, Int8, is_quantized, pieces
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.reporting.result import Result

pytestmark = pytest.mark.usefixtures("imports_are_no_garbage")

SIZES = [
    MIN_QUANTIZED_SIZE,
    MIN_QUANTIZED_SIZE + 1,
    20 * BLOCK_SIZE - 1,
    PIECE_SIZE,
    PIECE_SIZE + 3 * BLOCK_SIZE + 7,
    2 * PIECE_SIZE,
]


def numbers(size: int, seed: int, spread: float) -> Tensor:
    """Both signs; magnitudes over so many powers of e."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * torch.exp(spread * torch.randn(size, generator=generator))


def quantized(codec: Codec, values: Tensor, seed: int = 0) -> dict[str, Tensor]:
    state = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in codec.layout(tuple(values.shape)).items()}
    generator = torch.Generator().manual_seed(seed)
    for piece in pieces(values.numel()):
        codec.quantize(state, piece, values.view(-1)[piece].clone(), generator)
    return state


def dequantized(codec: Codec, state: Mapping[str, Tensor], size: int) -> Tensor:
    return torch.cat([codec.dequantize(state, piece) for piece in pieces(size)])


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


def parameters(*shapes: tuple[int, ...], seed: int = 4) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {f"p{number}": nn.Parameter(torch.randn(shape, generator=generator)) for number, shape in enumerate(shapes)}


def zeros(spec: OptimizerSpec, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {state: torch.zeros(shape, dtype=dtype) for state, (dtype, shape) in spec.layout(parameter).items()}
        for name, parameter in parameters.items()
    }


def give_gradients(parameters: Mapping[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


SHAPES = [(64, 65), (17,), (), (300, 257), (PIECE_SIZE // 64 + 1, 64), (8, 8, 8, 8)]


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
    ours, others = parameters(*SHAPES), parameters(*SHAPES)
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_quantized_state_on_a_gpu() -> None:
    values = numbers(PIECE_SIZE + 300, 0, 3.0)
    for signed in (True, False):
        own, codec = (values if signed else values.abs()), Int8("m", signed)
        state = {key: tensor.cuda() for key, tensor in quantized(codec, torch.zeros_like(own)).items()}
        generator = torch.Generator("cuda")
        for piece in pieces(len(own)):
            codec.quantize(state, piece, own[piece].cuda(), generator)
        assert all(torch.equal(state[key].cpu(), tensor) for key, tensor in quantized(codec, own).items())
    for kind in ("bf16", "int8"):
        spec = OptimizerSpec("adamw", state=kind, seed=2)  # type: ignore[arg-type]
        found = []
        for _ in range(2):
            ours = {name: nn.Parameter(parameter.detach().cuda()) for name, parameter in parameters(*SHAPES).items()}
            state = {name: {key: tensor.cuda() for key, tensor in one.items()} for name, one in zeros(spec, ours).items()}
            for parameter in ours.values():
                parameter.grad = parameter.detach().sin()
            spec.build(ours, state).step()
            found.append([*ours.values(), *(tensor for one in state.values() for tensor in one.values())])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# Training.


def mlp() -> nn.Module:
    """Of three weights one is in one piece and one in two, both with a last block that is not whole; one stays float32."""
    return nn.Sequential(nn.Linear(12, 400), nn.ReLU(), nn.Linear(400, 300), nn.ReLU(), nn.Dropout(0.1), nn.Linear(300, 4))


@pytest.fixture
def plain_quantized_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain loops step the whole model by one optimizer of the configuration's specification."""
    names = [name for name, _ in mlp().named_parameters()]

    def make(config: Any, partition: int, learning: list[nn.Parameter]) -> torch.optim.Optimizer:
        spec = OptimizerSpec(
            config.optimizer[0], config.lr[0], weight_decay=config.weight_decay, fused=config.fused, state=config.optimizer_state,
            seed=config.seed,
        )  # fmt: skip
        named = dict(zip(names, learning, strict=True))
        return spec.build(named, zeros(spec, named))

    monkeypatch.setattr(plainloops, "make_optimizer", make)


COMMON: dict[str, Any] = {"epochs": 2, "batch_size": 10, "lr": 0.01, "seed": 3, "val_fraction": 0.1}


def fit(folder: Path, data: Data | None = None, **options: Any) -> Result:
    options = {"method": "exact", "max_gpu_mem": "400MB", "device": "cpu", **options}
    return lowmem_pnn.fit(mlp, data or vectors(), workdir=folder, **options)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize(
    "options",
    [{"partitions": 1}, {"cuts": "1"}, {"cuts": "1,2", "micro_batch": 4}, {"cuts": "1,2", "clip_norm": 0.5, "optimizer": "adam"}],
    ids=["whole", "two", "accumulated", "clipped"],
)
@pytest.mark.usefixtures("plain_quantized_state")
def test_exact_with_quantized_state_is_same_as_one_optimizer_over_the_whole_model(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**COMMON, **options, "optimizer_state": kind}
    result = fit(tmp_path / "run", **options)
    expected = train_by_exact(mlp, vectors(), **options)
    assert_same_weights(loaded(mlp, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss
    unquantized = train_by_exact(mlp, vectors(), **{**options, "optimizer_state": "fp32"})
    assert not torch.equal(unquantized.model.state_dict()["2.weight"], expected.model.state_dict()["2.weight"])


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.usefixtures("plain_quantized_state")
def test_a_resident_partition_with_quantized_state_is_same_as_one_optimizer_over_the_whole_model(
    kind: str, tmp_path: Path
) -> None:
    options = {**COMMON, "micro_batch": 5, "optimizer_state": kind}
    result = fit(tmp_path / "run", method="backprop", **options)
    assert_same_weights(loaded(mlp, result.weights_file), train_by_backprop(mlp, vectors(), **options))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("method", ["exact", "pnn", "backprop"])
def test_a_run_with_quantized_state_that_was_stopped_and_resumed_is_same_as_uninterrupted(
    kind: str, method: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "max_gpu_mem": "400MB", "device": "cpu", "model": "mlp:64-100-100-10", "data": "digits", "train_limit": 60, "test_limit": 50,
        "method": method, "epochs": 3, "batch_size": 16, "lr": 0.01, "optimizer_state": kind,
    }  # fmt: skip
    if method != "backprop":
        options["cuts"] = "1,2"
    whole = trainer.start_run(configure(**options), tmp_path / "whole")
    for stop in (3, 7):
        asked = itertools.count(1)
        with pytest.raises(Stopped):
            trainer.start_run(
                configure(**options), tmp_path / f"run{stop}", should_stop=lambda at=stop, asked=asked: next(asked) >= at
            )
        result = trainer.resume_run(tmp_path / f"run{stop}")
        assert result.resumed == 1
        assert Path(result.weights_file).read_bytes() == Path(whole.weights_file).read_bytes()


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


# Memory.


@pytest.mark.parametrize("method", ["backprop", "exact"])
def test_the_plan_foresees_less_and_the_peak_keeps_to_it(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_gpu_mem": "600MB", "device": "cpu", "epochs": 1, "batch_size": 64, "method": method}
    if method == "exact":
        options["cuts"] = "1,2"
    found = {}
    for kind in ("fp32", "bf16", "int8"):
        own = {**options, "optimizer_state": kind}
        plan = lowmem_pnn.plan("mlp:64-2048-2048-10", "digits", **own)
        result = lowmem_pnn.fit("mlp:64-2048-2048-10", "digits", workdir=tmp_path / kind, train_limit=200, test_limit=100, **own)
        found[kind] = plan.predicted_peak_bytes, result.training_state_bytes, result.bytes_written
        assert result.oom_retries == 0
        assert result.peak_bytes <= result.predicted_peak_bytes
    params = 64 * 2048 + 2048**2 + 2048 * 10
    for kind, per_parameter in (("bf16", 4.0), ("int8", 6 - 8 / BLOCK_SIZE)):
        saved = per_parameter * params
        assert found["fp32"][1] - found[kind][1] == pytest.approx(saved, rel=1e-3)
        assert found["fp32"][2] - found[kind][2] >= 0.99 * saved  # headers
        temporaries = OptimizerSpec("adamw", state=kind).step_bytes(torch.empty(2048, 2048, device="meta"))  # type: ignore[arg-type]
        assert found["fp32"][0] - found[kind][0] >= 0.9 * (saved if method == "backprop" else 4 * 2048**2) - temporaries


# Refusals.


def test_an_option_without_effect_is_refused(tmp_path: Path) -> None:
    for optimizer in ("sgd", "adam,sgd"):
        with pytest.raises(ConfigError, match=r"^--optimizer-state has no effect here: it needs --optimizer adam or adamw$"):
            configure(max_gpu_mem="1GB", optimizer=optimizer, optimizer_state="int8")
    with pytest.raises(ConfigError, match=r"^--optimizer-state 'int4' is none of fp32, bf16, int8; did you mean 'int8'\?$"):
        configure(max_gpu_mem="1GB", optimizer_state="int4")
    with pytest.raises(
        ConfigError, match=r"^--optimizer-state bf16 has no effect here: .* no float32 parameters of 4096 elements or more"
    ):
        lowmem_pnn.fit(
            "mlp:12-16-4", vectors(), max_gpu_mem="400MB", device="cpu", optimizer_state="bf16", workdir=tmp_path / "run"
        )


def test_a_missing_torchao_is_named_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "torchao":
            raise ModuleNotFoundError("No module named 'torchao'", name="torchao")
        return imports(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    low_precision._torchao.cache_clear()
    low_precision._int8_levels.cache_clear()
    for act in (functools.partial(lowmem_pnn.fit, workdir=tmp_path / "run"), lowmem_pnn.plan):
        with pytest.raises(ConfigError) as caught:
            act(mlp, vectors(), max_gpu_mem="400MB", device="cpu", optimizer_state="int8")  # type: ignore[operator]
        assert str(caught.value) == (
            "--optimizer-state int8 needs torchao, which cannot be imported (No module named 'torchao'); pip install "
            "'lowmem-pnn[torchao]', or give bf16"
        )
    assert not (tmp_path / "run").exists()
    fit(tmp_path / "other", **{**COMMON, "epochs": 1, "cuts": "1", "optimizer_state": "bf16"})


def test_state_in_fp32_is_pytorchs_own_optimizer() -> None:
    config = configure(max_gpu_mem="1GB", model="python:m", data="python:d", optimizer="adamw")
    ours = parameters((64, 64))
    built = OptimizerSpec("adamw").build(ours, zeros(OptimizerSpec("adamw"), ours))
    assert type(built) is type(make_optimizer(config, 0, list(ours.values()))) is torch.optim.AdamW

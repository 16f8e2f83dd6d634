"""Compiling: layers that are alike share code, code gives what layers give, and takes the memory that plans foresee."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as watch

import lowmem_pnn
from helpers.commands import lowmem_pnn as command
from helpers.plainloops import assert_same_weights, loaded, stop_at
from helpers.small_networks import Data, images, small_conv, small_gpt, small_mlp, small_vit, tokens, vectors
from lowmem_pnn import api as trainer
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.model import compiler as compiling
from lowmem_pnn.model.chain import Chain, TensorSpec, capture
from lowmem_pnn.model.compiler import CompiledFunction, Compiler, CompileVariant
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling.fake_run import _Sink
from lowmem_pnn.profiling.profiler import profile
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.sources.gpt import GPT, GptShape

pytestmark = pytest.mark.usefixtures("imports_are_no_garbage")

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {"epochs": 2, "batch_size": 12, "lr": 0.01, "seed": 3, "val_fraction": 0.1}


def alike() -> nn.Module:
    """Three shapes of layers: a first, three alike, a last."""
    square = (module for _ in range(3) for module in (nn.Linear(16, 16), nn.GELU()))
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), *square, nn.Linear(16, 4))


def compiled(model: nn.Module, spec: TensorSpec) -> tuple[Chain, Compiler]:
    """The model's chain with code for 2 to 8 samples."""
    chain = capture(model, spec)
    compiler = Compiler(range(2, 9), CPU)
    for number, layer in enumerate(chain.layers):
        compiler.compile(
            layer, chain.boundaries[number], [CompileVariant(trains=True, learns_input=number > 0), CompileVariant(trains=False)]
        )
    return chain, compiler


def fit(build: Callable[[], nn.Module], data: Data, folder: Path, **options: Any) -> Result:
    options = {**COMMON, "method": "exact", "max_gpu_mem": "400MB", "device": "cpu", "compile": True, **options}
    return lowmem_pnn.fit(build, data, workdir=folder, **options)


# What is shared.


def test_layers_that_are_alike_share_code() -> None:
    chain, compiler = compiled(alike(), TensorSpec((12,), torch.float32))
    assert len(chain.layers) == 5
    assert compiler.num_functions == 3 * 2  # shapes, and uses: training and not


def test_a_gpt_of_twelve_blocks_compiles_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def note(program: Any, sizes: Sequence[int]) -> CompiledFunction:
        made.append(program)
        return CompiledFunction(lambda *tensors: [], frozenset(sizes), ())

    monkeypatch.setattr(compiling._TracedLayer, "compile", note)
    with torch.device("meta"):
        model = GPT(GptShape(layers=12, width=16, heads=2, context=8, dropout=0.1), 13)
    chain, compiler = capture(model, TensorSpec((8,), torch.int64)), Compiler(range(2, 9), CPU)
    assert len(chain.layers) == 1 + 2 * 12 + 1
    for number, layer in enumerate(chain.layers):
        compiler.compile(layer, chain.boundaries[number], [CompileVariant(trains=False)])
    # Embedding, attention, MLP; the last MLP, which ends in a norm; the last layer.
    assert len(made) == compiler.num_functions == 5


def test_layers_that_differ_in_what_shapes_do_not_show_share_nothing() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.linear, self.factor = nn.Linear(4, 4), factor

        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.linear(x) * self.factor
            return scaled

    chain = capture(nn.Sequential(Scaled(2.0), Scaled(3.0)), TensorSpec((4,), torch.float32))
    programs = [compiling._TracedLayer(layer, chain.boundaries[0], CompileVariant(trains=True), 4, CPU) for layer in chain.layers]
    assert programs[0].key != programs[1].key


def test_compiling_leaves_mode_weights_and_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        compiling._TracedLayer, "compile", lambda program, sizes: CompiledFunction(lambda *tensors: [], frozenset(sizes), ())
    )
    model = small_conv().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    chain, _ = compiled(model, TensorSpec((3, 8, 8), torch.float32))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for layer in chain.layers for module in layer.module.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# What it computes.


def test_code_gives_what_layers_give_draws_included_and_changes_buffers_in_place() -> None:
    torch.manual_seed(0)
    model = small_conv()
    chain, _ = compiled(model, TensorSpec((3, 8, 8), torch.float32))
    codes = [layer.compiled for layer in chain.layers]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    x = torch.randn(6, 3, 8, 8)

    def run(with_compiled_layers: bool) -> tuple[dict[str, Tensor], Tensor]:
        model.load_state_dict(values)
        model.zero_grad()
        for layer, code in zip(chain.layers, codes, strict=True):
            layer.compiled = code if with_compiled_layers else None
        torch.manual_seed(1)
        torch.autograd.backward(chain.train()(x).square().sum())
        with torch.no_grad():
            evaluated = chain.eval()(x)
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {**gradients, **{name: buffer.clone() for name, buffer in model.named_buffers()}}, evaluated

    (found, evaluated), (expected, as_it_is) = run(True), run(False)
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert buffers["1.num_batches_tracked"] == 1
    torch.testing.assert_close(evaluated, as_it_is)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_layers_run_as_they_are_where_there_is_no_code() -> None:
    chain, _ = compiled(nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)), TensorSpec((4,), torch.float32))
    layer = chain.layers[1]
    assert layer.compiled is not None
    tensors = {**layer.parameters(), **layer.buffers()}
    one, many, some = (torch.randn(size, 3, requires_grad=True) for size in (1, 9, 5))
    assert layer.compiled(True, tensors, (one,)) is None
    assert layer.compiled(True, tensors, (many,)) is None
    assert layer.compiled(False, tensors, (some,)) is None  # eval mode, with gradients
    assert layer.compiled(True, tensors, (some,)) is not None
    rows = torch.randn(5, 2, 3)
    assert layer.compiled(True, tensors, (rows,)) is None
    for x in (one, many, some, rows):
        torch.testing.assert_close(layer(x)[0], layer.module(x)[0])


@pytest.mark.parametrize(
    ("build", "data", "options"),
    [
        (small_conv, images(), {"cuts": "1,3"}),
        pytest.param(lambda: small_gpt(tied=True), tokens(), {"cuts": "1,3", "loss_chunk": 20}, marks=pytest.mark.slow),
        pytest.param(small_vit, images(), {"cuts": "2", "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param(small_conv, images(), {"cuts": "1,3", "precision": "bf16", "channels_last": True}, marks=pytest.mark.slow),
    ],
    ids=["conv", "tied gpt, loss in chunks", "vit in bf16", "conv in bf16, channels last"],
)
def test_exact_is_same_as_backprop(build: Callable[[], nn.Module], data: Data, options: dict[str, Any], tmp_path: Path) -> None:
    exact = fit(build, data, tmp_path / "exact", **options)
    whole = {name: value for name, value in options.items() if name != "cuts"}
    backprop = fit(build, data, tmp_path / "backprop", **whole, method="backprop")
    assert len(exact.partitions) == options["cuts"].count(",") + 2
    assert 0 < exact.compiled["functions"] <= 2 * exact.compiled["layers"]
    assert_same_weights(loaded(build, exact.weights_file), loaded(build, backprop.weights_file))
    assert exact.train_loss == backprop.train_loss
    as_it_is = fit(build, data, tmp_path / "plain", **options, compile=False)
    assert as_it_is.compiled == {}
    assert exact.train_loss == pytest.approx(as_it_is.train_loss, rel=0.05 if "precision" in options else 1e-3)


@pytest.mark.slow
def test_a_run_that_was_stopped_and_resumed_is_same_as_one_that_was_not(tmp_path: Path) -> None:
    whole = fit(small_conv, images(), tmp_path / "whole", cuts="1,3")
    options = {**COMMON, "method": "exact", "device": "cpu", "compile": True, "cuts": "1,3"}
    config = configure(max_gpu_mem="400MB", model="python:small_conv", data="python:tuple", **options)
    inputs = trainer.python_inputs(config, small_conv, images(), None, None)
    with pytest.raises(Stopped):
        trainer._train(config, tmp_path / "run", inputs, display=trainer.Display(), should_stop=stop_at(3))
    resumed = trainer._train(config, tmp_path / "run", inputs, display=trainer.Display(), resume=True)
    assert resumed is not None
    assert resumed.resumed == 1
    assert_same_weights(loaded(small_conv, resumed.weights_file), loaded(small_conv, whole.weights_file))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "pnn", "cuts": "1,2"}, {"method": "pnn", "recovery_epochs": 1, "partitions": 2},
                                     {"method": "neuroflux"}], ids=["pnn", "recovery", "neuroflux"])  # fmt: skip
def test_local_methods_learn_the_same_but_for_last_bits(options: dict[str, Any], tmp_path: Path) -> None:
    # Without BatchNorm: biases before it have gradients of rounding alone, which Adam makes as large as any.
    found = fit(small_mlp, vectors(), tmp_path / "compiled", **options)
    as_it_is = fit(small_mlp, vectors(), tmp_path / "plain", **options, compile=False)
    assert found.train_loss == pytest.approx(as_it_is.train_loss, rel=1e-3)
    weights = loaded(small_mlp, as_it_is.weights_file).state_dict()
    for name, tensor in loaded(small_mlp, found.weights_file).state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-2, atol=1e-3)


# What it takes.


@pytest.mark.parametrize(
    ("build", "spec"),
    [
        (alike, TensorSpec((12,), torch.float32)),
        (small_conv, TensorSpec((3, 8, 8), torch.float32)),
        pytest.param(lambda: small_gpt(tied=False), TensorSpec((8,), torch.int64), marks=pytest.mark.slow),
        pytest.param(small_vit, TensorSpec((3, 8, 8), torch.float32), marks=pytest.mark.slow),
    ],
    ids=["mlp", "conv", "gpt", "vit"],
)
def test_code_allocates_no_more_than_was_foreseen(build: Callable[[], nn.Module], spec: TensorSpec) -> None:
    chain, _ = compiled(build(), spec)
    costs = profile(chain, optimizers=[OptimizerSpec("adam")], device=CPU)
    chain.train()
    size = 7
    for number, (layer, cost) in enumerate(zip(chain.layers, costs.layers, strict=True)):
        specs = chain.boundaries[number]
        forward, kept, backward = _allocations(layer, tuple(_samples(size, spec, learns=number > 0) for spec in specs))
        assert kept <= cost.kept.at(size), layer.name
        # Convolutions of few channels have more scratch memory than is foreseen, with code or without: as much as maps of 16.
        scratch = 2 * size * 16 * 64 * 4 if any(tensor.dim() == 4 for tensor in layer.parameters().values()) else 0
        assert forward <= cost.forward_peak.at(size) + scratch, layer.name
        assert backward <= cost.output_bytes.at(size) + cost.backward_peak.at(size) + scratch, layer.name


def _allocations(layer: Layer, inputs: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """The most bytes in a layer's forward, those after it, and the most in its backward above those."""
    results: list[tuple[Tensor, ...]] = []
    forward, kept = _allocated(lambda: results.append(layer(*inputs)))
    end = _Sink.apply(CPU, *results.pop())  # makes gradients that nobody else holds
    begin = torch.ones_like(end)
    backward, _ = _allocated(lambda: end.backward(begin))
    return forward, kept, backward


def _samples(size: int, spec: TensorSpec, *, learns: bool) -> Tensor:
    if not spec.dtype.is_floating_point:
        return torch.zeros(size, *spec.shape, dtype=spec.dtype)
    return torch.randn(size, *spec.shape).requires_grad_(learns)


def _allocated(work: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes that PyTorch's allocator had given out in some work, and those it had at its end, above those at its beginning."""
    with watch(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    live = highest = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest, live


def test_a_run_stays_within_plan_and_budget(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = "--model mlp:64-1024-1024-1024-10 --data digits --method exact --cuts 1,2 --epochs 1 --device cpu"
    outcome = command(f"fit --max-gpu-mem 48MB {options} --compile --workdir {run} --json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["training_state_bytes"] > 0.7 * result["budget_bytes"]
    assert result["compiled"]["layers"] == 4
    assert result["compiled"]["functions"] == 2 * 3
    assert result["peak_bytes"] <= result["budget_bytes"]
    assert result["peak_bytes"] <= result["predicted_peak_bytes"] + result["reserve_bytes"]


# What is refused.


def test_without_a_compiler_nothing_begins(tmp_path: Path) -> None:
    from torch._inductor import config

    # Before anything else is looked at: there is no such data either.
    arguments = "--max-gpu-mem 100MB --model mlp:64-32-10 --data npz:missing.npz --compile"
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        outcomes = [command(f"fit {arguments} --workdir {tmp_path}/run"), command(f"plan {arguments}")]
    for outcome in outcomes:
        assert outcome.code == 3
        assert outcome.fault == (
            "--compile needs a C++ compiler, and 'no-such-compiler' does not run; install g++, name another one in CXX, or leave "
            "--compile out"
        )
    assert not (tmp_path / "run").exists()


def test_a_layer_that_cannot_be_compiled_is_named() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            mean: Tensor = self.linear(x) * float(x.sum())
            return mean

    chain = capture(nn.Sequential(nn.Linear(4, 4)), TensorSpec((4,), torch.float32))
    layer = dataclasses.replace(chain).layers[0]
    layer.module = Counting()
    with pytest.raises(ConfigError, match=r"--compile: PyTorch's compiler cannot compile layer '0': .*; leave --compile out"):
        Compiler(range(2, 5), CPU).compile(layer, chain.boundaries[0], [CompileVariant(trains=True)])


def test_one_sample_at_a_time_is_compiled_where_it_is_asked_for(tmp_path: Path) -> None:
    result = fit(lambda: nn.Sequential(nn.Linear(12, 4)), vectors(), tmp_path / "run", micro_batch=1, epochs=1, train_limit=6)
    assert result.compiled["functions"] == 2

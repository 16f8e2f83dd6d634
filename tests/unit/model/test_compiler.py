"""The compiler's requirements: a tested version of torch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as watch

from helpers.compiled import CPU, alike, compiled
from helpers.small_networks import small_conv, small_gpt, small_vit
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model import compiler as compiling
from lowmem_pnn.model.chain import TensorSpec, capture
from lowmem_pnn.model.compiler import CompiledFunction, Compiler, CompileVariant, check_compiler
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling.fake_run import _Sink
from lowmem_pnn.profiling.profiler import profile
from lowmem_pnn.sources.gpt import GPT, GptShape


@pytest.mark.parametrize("version", ["2.13.0", "2.15.0+cu130", "2.140.0", "3.0.0a0+git1234"])
def test_a_version_of_torch_that_was_not_tested_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ConfigError) as refused:
        check_compiler()
    assert str(refused.value) == (
        f"--compile is tested with torch 2.14.x, and this is torch {version}; leave --compile out or install a tested version"
    )


def test_the_installed_version_is_a_tested_one() -> None:
    check_compiler()


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

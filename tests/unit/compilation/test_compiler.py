"""The compiler: tested versions of torch; equal layers share code; code gives what layers give, in the memory that is foreseen."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compiled import CPU, alike, assert_allocates_what_was_foreseen, compiled, three_layers
from helpers.small_networks import small_conv
from lowmem_pnn.compilation import compiler as compiling
from lowmem_pnn.compilation.compiler import CompiledFunction, Compiler, CompileVariant, check_compiler
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import Chain, TensorSpec, capture
from lowmem_pnn.zoo.gpt_model import GPT, GptShape


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Chain]:
    """A network, and its chain with compiled layers."""
    torch.manual_seed(0)
    model = three_layers()
    return model, compiled(model, TensorSpec((3, 8, 8), torch.float32))[0]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that would be compiled; nothing is."""
    programs: list[Any] = []

    def note(program: Any, sizes: Sequence[int]) -> CompiledFunction:
        programs.append(program)
        return CompiledFunction(lambda *tensors: [], frozenset(sizes), ())

    monkeypatch.setattr(compiling._TracedLayer, "compile", note)
    return programs


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


def test_layers_that_are_alike_share_code(made: list[Any]) -> None:
    chain, compiler = compiled(alike(), TensorSpec((12,), torch.float32))
    assert len(chain.layers) == 5
    assert len(made) == compiler.num_functions == 3 * 2  # shapes, and uses: training and not


def test_a_gpt_of_many_blocks_compiles_one(made: list[Any]) -> None:
    with torch.device("meta"):
        model = GPT(GptShape(layers=4, width=16, heads=2, context=8, dropout=0.1), 13)
    chain, compiler = capture(model, TensorSpec((8,), torch.int64)), Compiler(range(2, 9), CPU)
    assert len(chain.layers) == 1 + 2 * 4 + 1
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


@pytest.mark.usefixtures("made")
def test_compiling_leaves_mode_weights_and_random_state_alone() -> None:
    model = small_conv().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    chain, _ = compiled(model, TensorSpec((3, 8, 8), torch.float32))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for layer in chain.layers for module in layer.module.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_code_gives_what_layers_give_draws_included_and_changes_buffers_in_place(network: tuple[nn.Module, Chain]) -> None:
    model, chain = network
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

    (expected, as_it_is), (found, evaluated) = run(False), run(True)
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert buffers["1.num_batches_tracked"] == 1
    torch.testing.assert_close(evaluated, as_it_is)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_layers_run_as_they_are_where_there_is_no_code(network: tuple[nn.Module, Chain]) -> None:
    layer = network[1].train().layers[2]
    assert layer.compiled is not None
    tensors = {**layer.parameters(), **layer.buffers()}
    one, many, some = (torch.randn(size, 16, requires_grad=True) for size in (1, 13, 5))
    assert layer.compiled(True, tensors, (one,)) is None
    assert layer.compiled(True, tensors, (many,)) is None
    assert layer.compiled(False, tensors, (some,)) is None  # eval mode, with gradients
    assert layer.compiled(True, tensors, (some,)) is not None
    rows = torch.randn(5, 2, 16)
    assert layer.compiled(True, tensors, (rows,)) is None
    for x in (one, many, some, rows):
        torch.testing.assert_close(layer(x)[0], layer.module(x)[0])


def test_code_allocates_no_more_than_was_foreseen(network: tuple[nn.Module, Chain]) -> None:
    assert_allocates_what_was_foreseen(network[1])


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

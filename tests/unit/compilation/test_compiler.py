"""The compiler: tested versions of torch; equal layers share code; code gives what layers give, in the memory that is foreseen."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compiled import CPU, alike, compiled
from helpers.small_networks import small_conv
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.compilation import compiler as compiling
from lowmem_pnn.compilation.compiled_layer import CompiledFunction, CompileVariant
from lowmem_pnn.compilation.compiler import Compiler, check_compiler
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.zoo.gpt_model import GPT, GptShape


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that would be compiled; nothing is."""
    programs: list[Any] = []

    def note(program: Any, sizes: Sequence[int]) -> CompiledFunction:
        programs.append(program)
        return CompiledFunction(lambda *tensors: [], (), frozenset(sizes), ())

    monkeypatch.setattr(compiling.TracedLayer, "compile", note)
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
    programs = [compiling.TracedLayer(layer, chain.boundaries[0], CompileVariant(trains=True), 4, CPU) for layer in chain.layers]
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

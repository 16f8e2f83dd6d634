"""What a recompute leaves out changes no gradient, and is left out only where nothing looks at it."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.model.layer import Layer
from lowmem_pnn.sweep.recompute import unneeded_products, without_products

WIDTH = 8


class Residual(nn.Module):
    """Two matrices, added to what came in."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Take and give (B, ..., WIDTH)."""
        added: Tensor = self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))
        return x + added


class Of(nn.Module):
    """Any forward, with one or two linear layers."""

    def __init__(self, work: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.work = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), work

    def forward(self, x: Tensor) -> Tensor:
        """Whatever was given."""
        return self.work(self, x)


def layer_of(module: nn.Module) -> Layer:
    """The module as the only layer of a chain."""
    model = nn.Sequential(module)
    graph_module = torch.fx.GraphModule(model, _graph_around(model))
    return Layer("0", graph_module, dict(model.named_parameters()))


def _graph_around(model: nn.Module) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    graph.output((graph.call_module("0", (graph.placeholder("x"),)),))
    return graph


def gradients(layer: Layer, x: Tensor, spared: tuple[nn.Module, ...]) -> tuple[list[Tensor], Tensor]:
    """Gradients of the inputs and the weights, and the outputs."""
    torch.manual_seed(0)
    x = x.detach().requires_grad_()
    for parameter in layer.parameters().values():
        parameter.grad = None
    with without_products(spared):
        (output,) = layer(x)
    weights = torch.linspace(-1, 2, output.numel()).reshape(output.shape)
    output.backward(weights)
    assert x.grad is not None
    return [x.grad, *(parameter.grad for parameter in layer.parameters().values() if parameter.grad is not None)], output.detach()


@pytest.mark.parametrize("shape", [(3, WIDTH), (3, 5, WIDTH), (2, 3, 4, WIDTH)])
@pytest.mark.parametrize(
    ("module", "count"),
    [
        (Residual(), 1),
        (Residual(0.5), 1),
        (nn.Sequential(Residual(), nn.Linear(WIDTH, 3)), 1),
        (Of(lambda self, x: self.first(x) + self.last(x)), 2),
        (Of(lambda self, x: torch.add(x, self.last(torch.relu(self.first(x))), alpha=2).transpose(0, 1)), 1),
        (Of(lambda self, x: self.last(self.first(x)).flatten(1)), 1),
    ],
)
def test_gradients_are_the_same_to_the_last_bit(module: nn.Module, count: int, shape: tuple[int, ...]) -> None:
    layer, x = layer_of(module), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    spared = unneeded_products(layer)
    assert len(spared) == count
    plain, outputs = gradients(layer, x, ())
    own, nothing = gradients(layer, x, spared)
    assert len(own) == len(plain)
    assert all(map(torch.equal, own, plain))
    assert outputs.isfinite().all()
    assert nothing.isnan().any(), "the product was computed"


@pytest.mark.parametrize(
    "work",
    [
        lambda self, x: torch.relu(self.last(x)),
        lambda self, x: self.last(x) * x,
        lambda self, x: self.last(x) + torch.tanh(self.last(x)),
        lambda self, x: nn.functional.layer_norm(x + self.last(x), (WIDTH,)),
        lambda self, x: (y := x * 2, y.add_(self.last(x)), torch.relu(y))[2],
        lambda self, x: (y := x * 2, z := y.view(-1), operator.iadd(y, self.last(x)), torch.relu(z))[3],
        lambda self, x: self.last(x) if float(x.sum()) > 0 else x,
    ],
    ids=["relu", "product", "called twice", "norm", "added in place", "added to a view's memory", "a branch on values"],
)
def test_what_is_looked_at_is_computed(work: Callable[[Any, Tensor], Tensor]) -> None:
    assert unneeded_products(layer_of(Of(work))) == ()


def test_an_output_that_is_also_used_inside_is_computed() -> None:
    module = Of(lambda self, x: (y := self.first(x)) + self.last(torch.relu(y)))
    assert unneeded_products(layer_of(module)) == (module.last,)


def test_a_module_with_hooks_is_computed() -> None:
    module = Residual()
    module.down.register_forward_hook(lambda module, inputs, output: None)
    assert unneeded_products(layer_of(module)) == ()


def test_modules_are_as_before_afterwards_and_after_an_error() -> None:
    module = Residual()
    x = torch.randn(3, WIDTH)
    before = module(x)
    with pytest.raises(KeyError), without_products((module.down,)):
        raise KeyError
    assert "forward" not in vars(module.down)
    assert torch.equal(module(x), before)


def test_a_layer_of_a_chain_is_looked_into() -> None:
    layer = layer_of(nn.Sequential(Residual(), Residual()))
    (spared,) = unneeded_products(layer)
    assert spared is layer.module.get_submodule("0.1.down")

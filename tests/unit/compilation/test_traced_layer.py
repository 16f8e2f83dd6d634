"""Traced layers: gradients are those of the module, whatever cuts or changes them; buffers that are replaced; hooks are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.compilation.compiled_layer import CompileVariant
from lowmem_pnn.compilation.compiler import Compiler
from lowmem_pnn.compilation.traced_layer import TracedLayer
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import TensorSpec

CPU, WIDTH = torch.device("cpu"), TensorSpec((4,), torch.float32)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -0.3 * gradients[0]


class _Cuts(nn.Module):
    """Cuts gradients in three ways, reverses one, and replaces a buffer whose old value backward needs."""

    mean: Tensor

    def __init__(self, reverses: bool = True) -> None:
        super().__init__()
        self.linear, self.reverses = nn.Linear(4, 4), reverses
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        straight = x + (y.round() - x).detach()
        with torch.no_grad():
            teacher = self.linear(x).tanh()
        centred = y * self.mean
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        returned: Tensor = _Reversed.apply(y) if self.reverses else y.clone()  # type: ignore[no-untyped-call]
        return straight + y * teacher + centred + returned * y


class _Uncompiled:
    """A traced graph that runs as it is, in the place of what the compiler makes of it."""

    def __init__(self, graph: Any) -> None:
        self._graph, self._boxed_call, self.current_callable = graph, True, lambda: None

    def __call__(self, arguments: list[Any]) -> Any:
        taken = list(arguments)
        arguments.clear()
        return self._graph(*taken)


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler's second half, which takes long and changes no gradient."""
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda graph, *_, **__: _Uncompiled(graph))


@pytest.mark.usefixtures("_uncompiled")
def test_gradients_and_replaced_buffers_are_those_of_the_module() -> None:
    torch.manual_seed(0)
    (layer,) = capture(nn.Sequential(_Cuts()), WIDTH).layers
    Compiler(range(2, 9), CPU).compile(layer, [WIDTH], [CompileVariant(trains=True, learns_input=True)])
    code, mean, x = layer.compiled, layer.buffers()["0.mean"], torch.randn(5, 4)
    assert code is not None

    def run(compiled: bool) -> list[Tensor]:
        layer.compiled, own = code if compiled else None, x.clone().requires_grad_()
        layer.set_tensor("0.mean", mean)
        (made,) = layer.train() or layer(own)
        after = layer.buffers()["0.mean"]
        assert after is not mean
        assert torch.equal(mean, torch.ones(4))
        return [made, after, *torch.autograd.grad(made.square().sum(), [own, *layer.parameters().values()])]

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected)


def test_layers_whose_gradients_differ_share_nothing() -> None:
    first, second = (capture(nn.Sequential(_Cuts(reverses)), WIDTH).layers[0] for reverses in (True, False))
    keys = [TracedLayer(layer, [WIDTH], CompileVariant(trains=True), 4, CPU).key for layer in (first, first, second)]
    assert keys[0] == keys[1] != keys[2]


class _Hooked(nn.Module):
    def __init__(self, within: bool) -> None:
        super().__init__()
        self.linear, self.within = nn.Linear(4, 4), within
        if not within:
            self.linear.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 0.5,))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if self.within and y.requires_grad:
            y.register_hook(lambda gradient: gradient.clamp(-1, 1))
        return y


@pytest.mark.parametrize("within", [True, False])
def test_hooks_on_gradients_inside_a_layer_are_refused(within: bool) -> None:
    (layer,) = capture(nn.Sequential(_Hooked(within)), WIDTH).layers
    with pytest.raises(ConfigError, match=r"^--compile: hooks look at gradients inside layer '0', and .*; leave --compile out$"):
        Compiler(range(2, 9), CPU).compile(layer, [WIDTH], [CompileVariant(trains=True)])
    layer(torch.randn(2, 4))[0].sum().backward()  # as it was

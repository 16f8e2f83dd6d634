"""The tracer: what a forward may do, what then stays whole, and what is refused in which words."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F

from helpers.networks import (
    FromFunction,
    assert_equal,
    layer_names,
    mlp,
    run,
    vector,
)
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.errors import CaptureError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Encoder(nn.Module):
    """Holds a chain of blocks, and does with them what it is told."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean(-1).dim() == 1:  # would be refused where blocks are looked into
            x = x + 1
        return F.dropout(self.linear(x), 0.3, self.training).relu()


@torch.no_grad()
def no_grad_of(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("function", "is_opened"),
    [
        (lambda m, x: m.blocks(x), True),
        (lambda m, x: F.dropout(m.blocks(x), 0.5 if m.training else 0.1, m.training), True),
        (lambda m, x: m.blocks(x)[slice(None, 2 if m.training else 1)].mean(0) + x, True),
        (lambda m, x: m.blocks(x) * 2 if m.training else m.blocks(x), False),
        (lambda m, x: m.blocks(x if m.blocks is not None else -x), True),
        (lambda m, x: m.blocks(x + 1 if x.dim() == 2 else x), True),
        (lambda m, x: m.blocks(x + 1 if x.shape[0] % 2 else x), False),
        (lambda m, x: m.blocks(x + 1 if x.shape[0] > 1 else x), False),
        (lambda m, x: m.blocks(x) + no_grad_of(x), False),
        (lambda m, x: m.blocks(x) * (torch.rand(()) + 1), False),
    ],
    ids=[
        "plain",
        "dropout",
        "slice",
        "other in eval",
        "looks at modules",
        "looks at shape",
        "looks at batch",
        "is right for some batches",
        "no_grad",
        "torch random",
    ],
)
def test_what_cannot_be_traced_stays_whole(function: Callable[[Any, Tensor], Tensor], is_opened: bool) -> None:
    model = FromFunction(
        lambda m, x: m.head(m.encoder(m.stem(x))), stem=nn.Linear(4, 4), encoder=Encoder(function), head=nn.Linear(4, 2)
    )
    chain = capture(model, vector(4))
    inside = ["encoder.blocks.0", "encoder.blocks.1"] if is_opened else ["encoder"]
    assert layer_names(chain) == ["stem", *inside, "head"]
    x = torch.randn(3, 4)
    for mode in (True, False):
        random.seed(1)
        expected = run(model.train(mode), x)
        random.seed(1)
        assert torch.equal(run(chain.train(mode), x), expected)


def test_optional_arguments_hooks_and_patched_forwards() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
            x = self.a(x) * scale
            return self.b(x if mask is None else x * mask)

    model = Model()
    model.register_forward_hook(lambda module, args, output: output + 1)
    model.a.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    chain = capture(model, vector(4))
    assert layer_names(chain) == ["a", "b"]
    assert_equal(chain, model, torch.randn(3, 4))


def test_constants_are_part_of_a_layer_but_no_weights() -> None:
    model = FromFunction(
        lambda m, x: m.b(m.a(x) * torch.arange(4) * m.scale) + m.scale.sum(), a=nn.Linear(4, 4), b=nn.Linear(4, 2)
    )
    model.scale = torch.tensor([1.0, -1.0, 2.0, 0.5])
    chain = capture(model, vector(4))
    assert layer_names(chain) == ["a", "b"]
    assert [[*layer.parameters(), *layer.buffers()] for layer in chain.layers] == [["a.weight", "a.bias"], ["b.weight", "b.bias"]]
    assert_equal(chain, model, torch.randn(3, 4))
    mode = FakeTensorMode()
    for device, context in (("meta", nullcontext()), ("cpu", mode)):
        with context:
            x = torch.empty(3, 4, device=device)
            for layer in chain.layers:
                weights = {name: torch.empty(weight.shape, device=device) for name, weight in layer.parameters().items()}
                [x] = functional_call(layer.module, weights, (x,))
        assert (x.shape, x.device.type, isinstance(x, FakeTensor)) == ((3, 2), device, context is mode)


def test_buffers_used_by_a_forward_belong_to_its_layer() -> None:
    model = FromFunction(lambda m, x: m.b(m.a(x) * (m.scale * 2)), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    model.register_buffer("scale", torch.randn(4), persistent=False)
    chain = capture(model, vector(4))
    assert list(chain.layers[0].buffers()) == ["scale"]
    chain.layers[0].set_tensor("scale", torch.zeros(4))
    assert torch.equal(chain(torch.randn(1, 4)), model.b(torch.zeros(1, 4)))


def forward_on_values(m: Any, x: Tensor) -> Tensor:
    return m.a(x) if x.sum() > 0 else m.b(x)


def add_noise(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) + torch.rand(2)


def other_in_eval(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).relu()) if m.training else m.b(m.a(x))


def looks_at_types(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).relu()) if type(x).__name__.endswith("Tensor") else m.b(m.a(x))


def looks_at_batch(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) if x.shape[0] > 1 else m.b(m.a(x).relu())


def in_a_module(message: str) -> str:
    return (
        f"model FromFunction cannot be cut into layers: its forward {message}; move what its forward does there into a module "
        "of its own, which then stays whole"
    )


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            forward_on_values,
            "in train mode: it reads a tensor's value (as by .item(), or in a condition), where capturing has shapes only",
        ),
        (add_noise, in_a_module("draws random numbers that tracing would freeze")),
        (other_in_eval, in_a_module("does other operations in train than in eval mode, from 'relu' on")),
        (
            lambda m, x: m.b(no_grad_of(m.a(x))),
            in_a_module("cannot be traced: torch.no_grad() inside a forward is not seen by torch.fx"),
        ),
        (
            looks_at_types,
            "in train mode it does aten.relu.default as operation 2, where its traced forward does aten.t.default; keep isin",
        ),
        (
            looks_at_batch,
            "cannot be cut into layers: its forward decides something by the number of samples, and does otherwise with 1; move what",
        ),
        (
            lambda m, x: m.b(m.a(x)) if x.shape[0] == 2 else m.b(x),
            in_a_module("decides something by the number of samples, which is another one in each batch"),
        ),
        (
            lambda m, x: m.b(m.a(x)) if m.training else (m.b(m.a(x)), x),
            "model FromFunction returns tensor in train mode and tuple of 2 in eval mode; wrap it in a module that returns the same",
        ),
        (
            lambda m, x: {"scores": m.b(m.a(x)), "sum": x.sum()},
            "model FromFunction returns a tensor 'sum' of shape () for a batch of 2; its first axis must be the batch",
        ),
        (
            lambda m, x: m.b(m.a(x)).sum(),
            "model FromFunction returns a tensor of shape () for a batch of 2; its first axis must be the batch",
        ),
        (
            lambda m, x: m.b(m.a(x)).t(),
            "model FromFunction returns a tensor of shape (2, 3) for a batch of 3; its first axis must be the b",
        ),
        (lambda m, x: 3, "model FromFunction returns int, in which there is no tensor; return the tensor to train on"),
        (
            lambda m, x: m.b(x) + m.a(x).sum().item(),
            "does not run on samples of (4,) float32 in train mode: it reads a tensor's value",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "",
)
def test_refused_forwards(forward: Callable[[Any, Tensor], Any], message: str) -> None:
    model = FromFunction(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    with pytest.raises(CaptureError) as caught:
        capture(model, vector(4))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_samples() -> None:
    with pytest.raises(
        CaptureError, match=r"model Sequential does not run on samples of \(1, 8, 8\) float32 in train mode, at '0': "
    ):
        capture(mlp(64, 32, 10), vector(1, 8, 8))


def test_refused_models() -> None:
    with pytest.raises(CaptureError, match=r"'0.weight' of Sequential has no shape yet; run the model once on one sample"):
        capture(nn.Sequential(nn.LazyLinear(3)), vector(4))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(
        CaptureError, match=r"'0.weight' and '1.weight' of Sequential are two tensors over one memory; make them one, as by"
    ):
        capture(model, vector(4))
    model = FromFunction(lambda m, x: m.graph(x), graph=nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=r"FromFunction has an attribute 'graph', which torch.fx keeps for itself; rename it"):
        capture(model, vector(4))
    model = FromFunction(lambda m, x: m.a(x), a=nn.Linear(4, 4))
    model.generator = (n for n in range(3))
    with pytest.raises(
        CaptureError, match=r"model FromFunction cannot be copied: cannot pickle 'generator' object; keep such an object"
    ):
        capture(model, vector(4))
    model = FromFunction(lambda m, x: m.a(x) * m.scale, a=nn.Linear(4, 4))
    model.scale = torch.ones(4, device="meta")
    with pytest.raises(
        CaptureError, match=r"uses a tensor without values, 'scale', that is neither a parameter nor a buffer; register it"
    ):
        capture(model, vector(4))

    class WithExtraState(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"count": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(
        CaptureError, match=r"the state_dict of Sequential holds '0._extra_state', which is no parameter or buffer"
    ):
        capture(nn.Sequential(WithExtraState(4, 4)), vector(4))

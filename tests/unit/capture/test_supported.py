"""What models hold and override: kept where training in pieces can keep it, else refused by name."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.networks import FromFunction, layer_names, vector
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.errors import CaptureError


class ZeroGrad(nn.Sequential):
    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


class Applies(nn.Sequential):
    def _apply(self, fn: Any, recurse: bool = True) -> "Applies":
        return self


class FewParameters(nn.Sequential):
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(list(super().parameters())[:1])


class OlderSignature(nn.Sequential):
    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Any:
        return super().named_parameters(prefix, recurse)


class HidesModules(nn.Module):
    """Has a layer in a plain list; another one for its scores, by which it also embeds."""

    def __init__(self, *hidden: nn.Module) -> None:
        super().__init__()
        self.linear, self.hidden = nn.Linear(4, 4), [*hidden]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.hidden[0].weight
        return nn.functional.linear(self.linear(x), weight) if (x < 100).all() else x


def head_that_holds_its_first_layer() -> nn.Module:
    first = nn.Linear(4, 4, bias=False)
    return nn.Sequential(first, HidesModules(first))


class SavesOthers(nn.Sequential):
    def state_dict(self, *arguments: Any, **settings: Any) -> Any:
        return {key: value * 2 for key, value in super().state_dict(*arguments, **settings).items()}


def grows(model: Any, x: Tensor) -> Tensor:
    model.a.running_mean = torch.zeros(5)
    scores: Tensor = model.b(x)
    return scores


def registers_late(model: Any, x: Tensor) -> Tensor:
    model.register_buffer("late", torch.zeros(4))
    scores: Tensor = model.a(x) + model.late
    return scores


class CountsAnd(nn.Module):
    """Counts its calls, and does something by their number; a layer of it is used from the tenth call on."""

    def __init__(self, does: Callable[[Any], object]) -> None:
        super().__init__()
        self.a, self.b, self.does, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), does, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.does(self)
        y: Tensor = self.a(x)
        return y + self.b(y) if self.calls > 9 else y


def test_what_a_later_forward_uses_is_not_taken_for_unused() -> None:
    chain = capture(nn.Sequential(CountsAnd(lambda model: None), nn.Linear(4, 2)), vector(4))
    assert chain.idle == ()
    assert chain.layers[0].may_lack_gradient == {"0.a.weight", "0.a.bias", "0.b.weight", "0.b.bias"}


CALLS = itertools.count(1)


class Moody(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * next(CALLS)


class Draws(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random()


class Remembers(nn.Module):
    """Adds the mean of its last outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(4, 4), None

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.linear(x)
        if self.last is not None:
            outputs = outputs + self.last
        self.last = outputs.detach().mean(0)
        return outputs


class KeepsObjects(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(len(self.seen))
        return super().forward(x) * len(self.seen)


class CountsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scaled: Tensor = self.linear(x) * self.calls
        return scaled


class CountsInATensor(nn.Linear):
    """Counts its calls in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.calls = torch.tensor(0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class ReadsAList(nn.Module):
    """Reads its weights from a list beside them, or keeps that without reading it; it goes by values, and so stays whole."""

    def __init__(self, *, reads: bool, opened: bool = False) -> None:
        super().__init__()
        self.weights: Any = []
        for number in range(2):
            self.register_parameter(f"weight{number}", nn.Parameter(torch.randn(4, 4)))
            self.weights.append(self.get_parameter(f"weight{number}"))
        self.reads, self.opened = reads, opened

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights if self.reads else (self.weight0, self.weight1):
            x = x @ weight
        return x if self.opened or (x < 100).all() else -x


class ReadsAView(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.rows = self.weight.data[:2]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.rows.sum()


def replace_train(model: nn.Sequential) -> None:
    own = model[0].train
    model[0].train = lambda mode=True: own(False)


class Unsteady(nn.Sequential):
    calls = 0

    def train(self, mode: bool = True) -> "Unsteady":
        super().train(mode)
        self.calls += 1
        self[0].training = mode and self.calls > 1
        return self


class SetsOthers(nn.Sequential):
    def train(self, mode: bool = True) -> "SetsOthers":
        super().train(mode)
        self[1].p = 0.5 if mode else 0.1
        return self


def linear_of(change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    change(model)
    return model


def tie_with_hook(model: nn.Sequential) -> None:
    model[1].weight = model[0].weight
    model[0].weight.register_hook(lambda gradient: gradient * 2)


def subclass_parameter(model: nn.Sequential) -> None:
    class Own(nn.Parameter):
        pass

    model[0].weight = Own(torch.ones(4, 4))


def complex_weight(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "zero_grad": (lambda: ZeroGrad(nn.Linear(4, 4)), "model ZeroGrad overrides zero_grad(), which is not called here"),
    "_apply": (lambda: Applies(nn.Linear(4, 4)), "model Applies overrides _apply(), which is not called here (tensors are moved"),
    "_apply inside": (
        lambda: nn.Sequential(Applies(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)),
        "module '0' of Sequential overrides _apply()",
    ),
    "parameters": (
        lambda: FewParameters(nn.Linear(4, 4)),
        "model FewParameters overrides parameters(), which leaves out some that learn; freeze these instead",
    ),
    "named_parameters": (
        lambda: OlderSignature(nn.Linear(4, 4)),
        "model OlderSignature overrides named_parameters(), which is not called here",
    ),
    "modules in a list": (
        lambda: nn.Sequential(HidesModules(nn.Linear(4, 4)), nn.Linear(4, 2)),
        "module '0' of Sequential holds a Linear in its attribute 'hidden' that is not registered as a module",
    ),
    "a module of another layer in a list": (
        head_that_holds_its_first_layer,
        "forward of module '1' of Sequential reads '0.weight' from its attribute 'hidden', where it would stay what it is",
    ),
    "a distribution": (
        lambda: FromFunction(lambda m, x: (m.a(x), torch.distributions.Normal(x, 1.0, validate_args=False)), a=nn.Linear(4, 4)),
        "the model returns a Normal, '1'; have it return tensors, or tuples and dicts of tensors",
    ),
    "an array": (
        lambda: FromFunction(lambda m, x: {"a": m.a(x), "grid": np.arange(3)}, a=nn.Linear(4, 4)),
        "the model returns a ndarray, 'grid'; have it return tensors",
    ),
    "state_dict": (lambda: SavesOthers(nn.Linear(4, 4)), "the state_dict of SavesOthers holds '0.weight', which is no parameter"),
    "python random": (
        lambda: nn.Sequential(Draws(4, 4)),
        "forward of model Sequential draws from Python's or numpy's random generator",
    ),
    "global state": (
        lambda: nn.Sequential(Moody(4, 4)),
        "forward of model Sequential does something else each time it is called on the same samples, by what is outside",
    ),
    "tensor kept": (
        lambda: nn.Sequential(Remembers(), nn.Linear(4, 2)),
        "forward of module '0' of Sequential leaves a tensor in its attribute 'last', which its next forward reads",
    ),
    "tensor counted": (
        lambda: nn.Sequential(CountsInATensor(), nn.Linear(4, 2)),
        "forward of module '0' of Sequential leaves a tensor in its attribute 'calls', which its next forward reads",
    ),
    "replaced method": (
        lambda: linear_of(replace_train),
        "train() of module '0' of Sequential was replaced on the module by a function that holds on to a module",
    ),
    "object kept": (
        lambda: nn.Sequential(KeepsObjects(), nn.Linear(4, 2)),
        "forward of module '0' of Sequential changes (a set) its attribute 'seen', which its next forward reads",
    ),
    "unsteady train": (lambda: Unsteady(nn.Linear(4, 4)), "train() of Unsteady does something else at each call"),
    "train sets others": (
        lambda: SetsOthers(nn.Linear(4, 4), nn.Dropout(0.3)),
        "train() or eval() of SetsOthers changes 'p' (float) of module '1', which is not kept when the model is cut",
    ),
    "hook on a tied weight": (
        lambda: linear_of(tie_with_hook),
        "parameter '0.weight' of Sequential has a hook on its gradient, and is used in 2 layers",
    ),
    "kind of parameter": (lambda: linear_of(subclass_parameter), "parameter 'weight' of module '0' of Sequential is a Own"),
    "complex": (
        lambda: linear_of(complex_weight),
        "'0.weight' of Sequential is of type complex64, which weight files do not hold",
    ),
    "sparse": (
        lambda: nn.Sequential(nn.Embedding(4, 4, sparse=True)),
        "module '0' of Sequential has sparse gradients (Embedding(sparse=True)), which no optimizer here takes",
    ),
    "weights in a list": (
        lambda: nn.Sequential(nn.Linear(4, 4), ReadsAList(reads=True), nn.Linear(4, 2)),
        "forward of module '1' of Sequential reads '1.weight0' from its attribute 'weights', where it would stay what it is when training "
        "puts another tensor in its place; read it by its own name, or from an nn.ParameterList",
    ),
    "weights in a list of the model": (
        lambda: ReadsAList(reads=True),
        "forward of model ReadsAList reads 'weight0' from its attribute",
    ),
    "view of a weight": (
        lambda: nn.Sequential(ReadsAView(), nn.Linear(4, 2)),
        "forward of module '0' of Sequential reads '0.weight' from its attribute 'rows', where it would stay what it is",
    ),
    "a buffer of another shape": (
        lambda: FromFunction(grows, a=nn.BatchNorm1d(4), b=nn.Linear(4, 4)),
        "'a.running_mean' of FromFunction was (4,) float32 and is (5,) float32 after a forward; keep its shape and type; where the first "
        "forward alone does so, run the model once on a sample, and give the built model",
    ),
    "a buffer that comes late": (
        lambda: FromFunction(registers_late, a=nn.Linear(4, 4)),
        "forward of FromFunction registers buffer 'late', which was not there before; register it in the constructor",
    ),
    "a module that comes late": (
        lambda: FromFunction(lambda m, x: m.add_module("late", nn.Linear(4, 4)) or m.late(m.a(x)), a=nn.Linear(4, 4)),
        "forward of FromFunction registers parameter 'late.weight', which was not there before; register it in the constructor",
    ),
    "freezes in a later call": (
        lambda: CountsAnd(lambda m: m.a.requires_grad_(m.calls < 9)),
        "forward of CountsAnd freezes 'a.weight' (requires_grad), which is not kept with a run; detach() what it gives, or give --freeze",
    ),
    "unfreezes": (
        lambda: CountsAnd(lambda m: m.b.requires_grad_(m.calls > 9)).requires_grad_(False),
        "forward of CountsAnd unfreezes 'b.weight' (requires_grad), which is not kept with a run; let it learn from the beginning, or",
    ),
    "whole numbers": (
        lambda: FromFunction(lambda m, x: m.a(x).argmax(1, keepdim=True), a=nn.Linear(4, 4)),
        "model FromFunction returns a tensor of type int64, from which no gradient comes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_is_refused_by_name(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(CaptureError) as caught:
        capture(build(), vector(4))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scripted_module_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"module '0' of Sequential is a torch\.jit\.ScriptModule, whose tensors cannot be"):
        capture(nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 2)), vector(4))


def test_a_hook_on_all_modules_is_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, outputs: None)
    try:
        with pytest.raises(CaptureError, match="a hook on all modules is registered"):
            capture(nn.Sequential(nn.Linear(4, 4)), vector(4))
    finally:
        handle.remove()


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class TriplesItsCall(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        scores: Tensor = super().__call__(x) * 3
        return scores


class Keeps(nn.Module):
    """Leaves its features, and a constant that it makes once, in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.steps = nn.Linear(4, 4), None

    def forward(self, x: Tensor) -> Tensor:
        if self.steps is None:
            self.steps = torch.arange(4.0)
        self.features = self.linear(x)
        return self.features * self.steps


class HoldsItsOwn(HidesModules):
    def __init__(self) -> None:
        super().__init__()
        self.hidden.append(self.linear)


def through_frozen(model: Any, x: Tensor) -> Tensor:
    model.b.requires_grad_(False)
    y = model.b(model.a(x))
    model.b.requires_grad_(True)
    scores: Tensor = y + model.b(x)
    return scores


KEPT: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "autograd function": (
        lambda: FromFunction(lambda m, x: m.b(Doubles.apply(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        ["a", "b"],
    ),
    "made of the batch's size": (
        lambda: FromFunction(lambda m, x: m.b(m.a(x) + torch.ones(x.size(0), 4)), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        ["a", "b"],
    ),
    "call of the model": (lambda: TriplesItsCall(nn.Linear(4, 4), nn.Linear(4, 2)), ["0", "1"]),
    "call of a container": (lambda: nn.Sequential(TriplesItsCall(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)), ["0.0", "1"]),
    "weights in a list that nobody reads": (
        lambda: nn.Sequential(nn.Linear(4, 4), ReadsAList(reads=False), nn.Linear(4, 2)),
        ["0", "1", "2"],
    ),
    "weights in a list of what is traced": (lambda: ReadsAList(reads=True, opened=True), ["weight0", "weight1"]),
    "a module of its own in a list too": (lambda: nn.Sequential(HoldsItsOwn(), nn.Linear(4, 2)), ["0", "1"]),
    "weights of an LSTM": (
        lambda: FromFunction(lambda m, x: m.b(m.a(x[:, None])[0][:, 0]), a=nn.LSTM(4, 4, batch_first=True), b=nn.Linear(4, 2)),
        ["a", "b"],
    ),
    "frozen for a while": (
        lambda: nn.Sequential(
            nn.Linear(4, 4), FromFunction(through_frozen, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), nn.Linear(4, 2)
        ),
        ["0", "1", "2"],
    ),
    "tensors that nobody reads": (lambda: nn.Sequential(nn.Linear(4, 4), Keeps(), nn.Linear(4, 2)), ["0", "1", "2"]),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_can_be_kept_is_cut_and_gives_the_same_gradients(case: str) -> None:
    build, names = KEPT[case]
    torch.manual_seed(0)
    model = build()
    chain = capture(model, vector(4))
    assert layer_names(chain) == names
    x = torch.randn(3, 4)
    parameters = list(model.parameters())
    ours, theirs = chain(x), model(x)
    assert torch.equal(ours, theirs)
    for one, other in zip(
        torch.autograd.grad(ours.square().sum(), parameters), torch.autograd.grad(theirs.square().sum(), parameters), strict=True
    ):
        assert torch.equal(one, other)


class MakesAMask(nn.Module):
    """A model that makes a mask anew for samples that are longer than those before, and keeps it beside its weights."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[0] < x.shape[1]:
            self.mask = torch.ones(x.shape[1], device=x.device)
        return self.b(self.a(x) * self.mask)


@pytest.mark.parametrize("mask", [None, torch.ones(2)])
def test_buffers_that_no_file_holds_may_grow(mask: Tensor | None) -> None:
    assert len(capture(MakesAMask(mask), vector(4)).layers) == 2

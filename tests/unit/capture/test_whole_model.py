"""Models whose own forward cannot be traced: one layer, which gives what the model gives, and says why it is whole."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.networks import FromFunction, assert_equal, vector
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.chain import Chain


def sharp(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.7 * x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is old, and in use
    scripted = torch.jit.script(sharp)


@torch.no_grad()
def halved(x: Tensor) -> Tensor:
    return x / 2


def on_values(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) if x.sum() > 0 else m.b(m.a(x) * 2)


def with_noise(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) + torch.rand(2)


def other_in_eval(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).relu()) if m.training else m.b(m.a(x))


def by_type(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).relu()) if type(x).__name__.endswith("Tensor") else m.b(m.a(x))


def by_batch(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) if x.shape[0] > 1 else m.b(m.a(x).relu())


def derivative(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.requires_grad_()
        [gradient] = torch.autograd.grad(torch.tanh(m.a(x)).sum(), x, create_graph=True)
    return m.b(gradient)


CASES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "condition": (on_values, "its forward does something by values of its input"),
    "number": (lambda m, x: m.b(m.a(x)) + m.a(x).sum().item(), "its forward does something by values of its input"),
    "mask": (lambda m, x: m.b(m.a(x).masked_scatter(x > 0, x[x > 0] * 2)), "its forward does something by values of its input"),
    "noise": (with_noise, "its forward draws random numbers that tracing would freeze"),
    "mode": (other_in_eval, "its forward does other operations in train than in eval mode, from 'relu' on"),
    "no gradients": (
        lambda m, x: m.b(m.a(x) + halved(m.a(x))),
        "its forward cannot be traced: torch.no_grad() inside a forward is not seen by torch.fx",
    ),
    "type": (by_type, "its forward does something else where it is traced"),
    "batch": (by_batch, "its forward decides something by the number of samples, and does otherwise with 1"),
    "script": (lambda m, x: m.b(scripted(m.a(x))), "its forward cannot be traced: sharp() Expected a value of type 'Tensor'"),
    "vmap": (lambda m, x: m.b(torch.vmap(lambda row: m.a.weight @ row + m.a.bias)(x)), "its forward cannot be traced: vmap("),
    "derivative": (derivative, "its forward cannot be traced: torch.autograd inside a forward takes the whole of it"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_cannot_be_cut_is_one_layer_and_says_why(case: str) -> None:
    forward, reason = CASES[case]
    model = FromFunction(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    chain = capture(model, vector(4))
    [layer] = chain.layers
    assert (layer.name, list(layer.parameters())) == ("model", ["a.weight", "a.bias", "b.weight", "b.bias"])
    assert layer.whole.startswith(f"whole: {reason}")
    assert "; 100% of the weights; " in layer.whole
    assert not chain.idle
    assert_equal(chain, model, torch.randn(3, 4))


def test_what_hangs_on_the_model_itself_happens_once() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.calls = nn.Linear(4, 2), 0
            self.register_buffer("scale", torch.ones(2))

        def forward(self, x: Tensor) -> Any:
            self.calls += self.training
            return {"scores": self.a(x) * self.scale * (self.calls if x.sum() > 0 else 1)}

    model = Counts()
    model.register_forward_hook(lambda module, args, output: {"scores": output["scores"] + 1})
    chain, twin = capture(model, vector(4)), copy.deepcopy(model)
    assert (model.calls, chain.python_state) == (0, {".calls": 0})
    for training in (True, False, True):
        x = torch.ones(3, 4)
        assert torch.equal(chain.train(training)(x)["scores"], twin.train(training)(x)["scores"])
    assert chain.python_state == {".calls": 2}
    chain.set_python_state({".calls": 5})
    chain.layers[0].set_tensor("scale", torch.zeros(2))
    assert torch.equal(chain(torch.ones(1, 4))["scores"], torch.ones(1, 2))
    assert chain.python_state == {".calls": 6}


class CountsLarge(nn.Module):
    """Changes its state only where its input is large, which no example need be."""

    def __init__(self, keep: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.a, self.keep, self.seen = nn.Linear(4, 4), keep, 0
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 100:
            self.keep(self, x)
        return self.a(x) * (1 + self.largest)


def count(module: Any, x: Tensor) -> None:
    module.seen += 1


def test_what_a_condition_changes_is_kept() -> None:
    model = nn.Sequential(CountsLarge(count), nn.Linear(4, 2))
    chain = capture(model, vector(4))
    assert layers_of(chain) == [("0", True), ("1", False)]
    assert chain.python_state == {"0.seen": 0}
    chain(torch.full((2, 4), 200.0))
    assert chain.python_state == {"0.seen": 1}


def test_what_a_condition_leaves_and_cannot_be_kept_is_refused() -> None:
    def leave(module: Any, x: Tensor) -> None:
        module.seen = x + module.seen

    with pytest.raises(CaptureError, match="leaves a tensor in its attribute 'seen', which its next forward reads"):
        capture(nn.Sequential(CountsLarge(leave), nn.Linear(4, 2)), vector(4))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m.a(x) if x.sum() > 0 else m.b(x).sum(), "returns a tensor of shape () for a batch of 2"),
        (lambda m, x: (m.a(x[x[:, 0] > 9].sum(0) + x), x) if m.training else m.b(x), "returns tuple of 2 in train mode and tensor in eval mode"),
    ],
)  # fmt: skip
def test_what_is_returned_is_checked_as_ever(forward: Callable[[Any, Tensor], Any], message: str) -> None:
    model = FromFunction(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    with pytest.raises(CaptureError) as caught:
        capture(model, vector(4))
    assert message in str(caught.value)


class Experts(nn.Module):
    """A mixture of experts, each of which is called on the rows that are routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen, mixed = self.gate(x).softmax(-1), x[:, 0].argsort() % 3, torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)
            if rows.numel():
                mixed = mixed.index_add(0, rows, expert(x[rows]) * weights[rows, number, None])
        return x + mixed


def layers_of(chain: Chain) -> list[tuple[str, bool]]:
    return [(layer.name, bool(layer.whole)) for layer in chain.layers]


def test_a_module_that_goes_by_values_is_whole_and_the_others_are_cut() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Experts(), nn.Linear(4, 4), Experts(), nn.Linear(4, 2))
    chain = capture(model, vector(4))
    assert layers_of(chain) == [("0", False), ("1", True), ("2", False), ("3", True), ("4", False)]
    assert not chain.idle
    for seed in range(4):
        torch.manual_seed(seed)
        assert_equal(chain, model, torch.randn(40, 4))


def test_what_is_given_rows_by_values_is_whole_too() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            score = self.score(x)
            return (x * score)[score[:, 0] > 0]

    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pick, self.mix = Picks(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            picked = self.pick(x)
            return x + self.mix(picked).sum(0) if len(picked) else x

    model = nn.Sequential(nn.Linear(4, 4), Pools(), nn.Linear(4, 2))
    chain = capture(model, vector(4))
    assert layers_of(chain) == [("0", False), ("1", True), ("2", False)]
    assert_equal(chain, model, torch.randn(12, 4))


def test_a_size_that_was_read_from_values_is_no_boundary() -> None:
    class Trims(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, : max(2, int((x.mean(0) > -9).sum()))]

    mean = FromFunction(lambda m, x: x.mean(1, keepdim=True))
    norm = nn.BatchNorm1d(4, momentum=None)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Sequential(nn.Linear(4, 4), Trims()), mean, nn.Linear(1, 2))
    chain = capture(model, vector(4))
    assert layers_of(chain) == [("model", True)]
    assert_equal(chain, model, torch.randn(3, 4))
    # The count of a norm's batches is no size.
    assert len(capture(nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 2)), vector(4)).layers) == 2


def test_a_condition_that_never_comes_true_is_not_waited_for() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        while not (x.abs() < 1e-3).all():
            x = x / 2
        return m.a(x)

    with pytest.raises(CaptureError, match="it reads a tensor's value"):
        capture(FromFunction(forward, a=nn.Linear(4, 2)), vector(4))


class Sometimes(nn.Module):
    """Counts its calls; now and then it lowers a number, and moves a frozen average; and in its third call it sets another number."""

    def __init__(self, every: int, reads: bool = False) -> None:
        super().__init__()
        self.a, self.average = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.calls, self.every, self.tau, self.gain, self.reads, self.last = 0, every, 1.0, 1, reads, torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        outputs: Tensor = self.a(x) * self.tau * self.gain + self.average(x)
        if self.reads and self.calls > 500:
            outputs = outputs + self.last
        self.last = outputs.detach().mean(0)
        if self.calls == 3:
            self.gain = 2
        if self.calls % self.every == 0:
            self.tau *= 0.5
            self.average.weight.data.lerp_(self.a.weight.data, 0.1)
        return outputs


def test_what_a_later_forward_changes_is_kept_too() -> None:
    chain = capture(nn.Sequential(Sometimes(3), nn.Linear(4, 2)), vector(4))
    assert list(chain.layers[0].buffers()) == ["0.average.weight"]
    assert chain.python_state == {"0.calls": 0, "0.tau": 1.0}
    state = []
    for _ in range(3):
        state.append(chain.python_state)
        chain(torch.ones(2, 4))
    assert chain.python_state == {"0.calls": 3, "0.tau": 0.5, "0.gain": 2}
    changed = chain.python_state
    chain.set_python_state(state[2])
    assert chain.python_state == {"0.calls": 2, "0.tau": 1.0}
    chain(torch.ones(2, 4))
    assert chain.python_state == changed
    with chain.python_state_restored():
        for _ in range(3):
            chain(torch.ones(2, 4))
        assert chain.python_state == {"0.calls": 6, "0.tau": 0.25, "0.gain": 2}
    assert chain.python_state == changed


def test_what_a_later_forward_reads_and_cannot_be_kept_is_refused() -> None:
    with pytest.raises(CaptureError, match="leaves a tensor in its attribute 'last', which its next forward reads"):
        capture(nn.Sequential(Sometimes(3, reads=True), nn.Linear(4, 2)), vector(4))


@pytest.mark.parametrize("condition", [lambda n: n == 0, lambda n: n > 100, lambda n: n == 1])
def test_what_is_done_by_a_number_is_looked_at(condition: Callable[[float], bool]) -> None:
    class ByNumber(CountsLarge):
        def forward(self, x: Tensor) -> Tensor:
            if condition(x.abs().max().item()):
                self.keep(self, x)
            return self.a(x)

    def leave(module: Any, x: Tensor) -> None:
        module.seen = x + module.seen

    with pytest.raises(CaptureError, match="leaves a tensor in its attribute 'seen', which its next forward reads"):
        capture(nn.Sequential(ByNumber(leave), nn.Linear(4, 2)), vector(4))

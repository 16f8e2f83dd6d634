"""Data flow: no cut where something else than samples crosses it, or where what crosses it is changed in place later."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.networks import (
    FromFunction,
    assert_cut_anywhere,
    assert_equal,
    layer_names,
    vector,
)
from helpers.small_networks import Attending
from lowmem_pnn.capture.capture import capture


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


IN_PLACE: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "module on a skip": (lambda m, x: m.c(m.b(y := m.a(x)) + m.relu(y)), ["a", "c"]),
    "method": (lambda m, x: m.c(m.b(y := m.a(x)) + y.mul_(2)), ["a", "c"]),
    "operator": (lambda m, x: m.c(add_in_place(m.a(x), m.b)), ["a", "c"]),
    "item": (lambda m, x: m.c(set_item(m.a(x), m.b)), ["a", "c"]),
    "out of a function": (lambda m, x: m.c(F.relu(m.a(x), inplace=True) + m.b(x)), ["a", "b", "c"]),
    "view of what is changed": (lambda m, x: m.c(m.b(y := m.a(x)) + y.view(-1, 4).relu_()), ["a", "c"]),
    "base of a view": (lambda m, x: m.c(m.b((y := m.a(x)).view(-1, 4)) + y.relu_()), ["a", "c"]),
    "what comes out": (lambda m, x: m.c(m.relu(m.b(m.a(x)))), ["a", "b", "c"]),
    "views that stay as they are": (lambda m, x: m.c(m.b((y := m.a(x))[:, :4]) + y.view(-1, 4)), ["a", "b", "c"]),
    "inside a block": (lambda m, x: m.c(m.block(y := m.a(x)) + m.b(y)), ["a", "b", "c"]),
    "out argument": (lambda m, x: m.c(m.b(y := m.a(x)) + torch.exp(y.detach(), out=y.detach())), ["a", "c"]),
}


def add_in_place(x: Tensor, module: Callable[[Tensor], Tensor]) -> Tensor:
    hidden = module(x)
    x += 1
    return x * hidden


def set_item(x: Tensor, module: Callable[[Tensor], Tensor]) -> Tensor:
    hidden = module(x)
    x[:, 0] = 1
    return x + hidden


@pytest.mark.parametrize("case", IN_PLACE)
def test_no_cut_before_a_change_in_place(case: str) -> None:
    function, expected = IN_PLACE[case]
    members = {"relu": nn.ReLU(inplace=True), "block": nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True))}
    if case == "inside a block":
        members["block"] = FromFunction(lambda m, x: m.relu(x), relu=nn.ReLU(inplace=True))
    model = FromFunction(function, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2), **members)
    chain = capture(model, vector(4))
    assert layer_names(chain) == expected
    x = torch.randn(3, 4)
    assert torch.equal(chain(x), model(x))
    assert_cut_anywhere(chain, x)


def test_input_is_not_changed_in_place() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 2))
    chain = capture(model, vector(4))
    x = torch.randn(3, 4)
    kept = x.clone()
    output = chain(x)
    assert torch.equal(x, kept)
    assert torch.equal(output, model(x))


def test_the_number_of_samples_does_not_cross_a_cut() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, width = x.shape
        shift = torch.zeros(n, width, device=x.device) + torch.arange(width)
        return m.c(m.b(m.a(x)).reshape(n, width) + shift)

    model = FromFunction(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2))
    chain = capture(model, vector(4))
    assert layer_names(chain) == ["a", "b", "c"]
    assert [len(specs) for specs in chain.boundaries] == [1, 1, 1, 1]
    for batch in (1, 3):
        assert_equal(chain, model, torch.randn(batch, 4))


def test_no_cut_where_a_number_of_rows_is_alive() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        return m.c(m.b(m.a(rows)) * rows.shape[0]).unflatten(0, (-1, 2))

    model = FromFunction(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2))
    chain = capture(model, vector(2, 4))
    assert layer_names(chain) == ["a"]
    assert_equal(chain, model, torch.randn(3, 2, 4))


def test_no_cut_where_the_batch_is_on_another_axis() -> None:
    model = FromFunction(
        lambda m, x: m.c(m.b(m.a(x).transpose(0, 1)).transpose(0, 1)), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2)
    )
    chain = capture(model, vector(2, 4))
    assert layer_names(chain) == ["a", "c"]
    assert_equal(chain, model, torch.randn(3, 2, 4))


def test_no_cut_where_weights_alone_are_alive() -> None:
    model = FromFunction(lambda m, x: m.b(m.a(x)) * m.scale.exp(), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.scale = nn.Parameter(torch.randn(4))
    chain = capture(model, vector(4))
    # exp(scale) is one value for all samples; it is computed and used in one layer.
    assert layer_names(chain) == ["a", "b", "scale"]
    assert_equal(chain, model, torch.randn(3, 4))
    model = FromFunction(lambda m, x: m.a(x) @ (s := m.scale.exp()) + m.b(x) @ s, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.scale = nn.Parameter(torch.randn(4, 4))
    assert layer_names(capture(model, vector(4))) == ["a", "scale"]


def test_no_cut_across_too_many_tensors() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = [x]
        for layer in m.layers:
            hidden.append(layer(hidden[-1]))
        return torch.stack(hidden).sum(0)

    chain = capture(FromFunction(forward, layers=nn.ModuleList([nn.Linear(2, 2) for _ in range(67)])), vector(2))
    assert max(map(len, chain.boundaries)) == 64
    assert len(chain.layers) == 64


def test_no_cut_where_a_complex_tensor_is_alive() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(m.a(x))
        return m.c(m.d(torch.fft.irfft(spectrum * m.b(x), 4)))

    model = FromFunction(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3), c=nn.Linear(4, 2), d=nn.Linear(4, 4))
    chain = capture(model, vector(4))
    assert layer_names(chain) == ["a", "d", "c"]
    assert_equal(chain, model, torch.randn(3, 4))


def test_what_is_made_of_the_inputs_alone_takes_no_gradient() -> None:
    chain = capture(Attending(), (vector(16, 8), vector(1, 16, 16)))
    # The bias comes before the hidden state, as it was there first.
    takes = [[spec.takes_gradient for spec in specs] for specs in chain.boundaries]
    assert takes == [[False, False], [False, True], [False, True], [True], [True]]


class Chooses(nn.Module):
    """Learns something by values of its input, which no trace shows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x + 1


@pytest.mark.parametrize(("make", "takes"), [(nn.Softmax(-1), False), (nn.Linear(4, 4), True), (Chooses(), True)])
def test_what_may_learn_by_values_takes_a_gradient(make: nn.Module, takes: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        made = m.make(x)
        return m.c(m.b(m.a(x)) + made)

    model = FromFunction(forward, make=make, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2))
    assert [spec.takes_gradient for spec in capture(model, vector(4)).boundaries[-3]] == [takes, True]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(m.a(x)) if x.shape[0] > 32 else m.b(m.a(x).relu()),
        lambda m, x: m.b(m.a(x) + x[: min(x.size(0), 16)].mean(0)),
        lambda m, x: m.b(m.a(x)) if m.training or len(x) != 64 else m.b(m.a(x).relu()),
    ],
    ids=["comparison", "least", "in eval mode"],
)
def test_decisions_by_the_number_of_samples_hold_for_those_that_occur(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model = nn.Sequential(FromFunction(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), nn.Linear(4, 2))
    x = torch.randn(64, 4)
    chain = capture(model, vector(4), batches=(64,))
    assert layer_names(chain) == ["0", "1"]
    assert_equal(chain, model, x)
    assert torch.equal(chain.eval()(x), model.eval()(x))

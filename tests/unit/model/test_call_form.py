"""Call forms: several inputs, and outputs that are tuples, dicts and dataclasses, go through a chain as through the model."""

import dataclasses
import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from helpers.networks import FromFunction, vector
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.call_form import CallForm


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
        return self.c(self.a(x).relu() * scale + self.b(y))


class Packed(Two):
    def forward(self, pair: Any) -> Tensor:  # type: ignore[override]
        x, y = (pair["x"], pair["y"]) if isinstance(pair, dict) else pair
        return super().forward(x, y)


X, Y = torch.randn(5, 4), torch.randn(5, 3)


@pytest.mark.parametrize(
    ("model", "sample", "names"),
    [
        (Two(), (X, Y), ("0", "1")),
        (Two(), [X, Y], ("0", "1")),
        (Two(), {"x": X, "y": Y}, ("x", "y")),
        (Packed(), (X, Y), ("0", "1")),
        (Packed(), {"x": X, "y": Y}, ("x", "y")),
    ],
    ids=["tuple", "list", "names", "one tuple", "one dict"],
)
def test_inputs_reach_the_model_as_they_came(model: nn.Module, sample: Any, names: tuple[str, ...]) -> None:
    form = CallForm.of(sample, model)
    assert form.names == names
    assert pickle.loads(pickle.dumps(form)) == form
    tensors = form.flatten(sample)
    assert all(one is other for one, other in zip(tensors, (X, Y), strict=True))
    chain = capture(model, (vector(4), vector(3)), call=form)
    assert [layer.name for layer in chain.layers] == ["a", "b", "c"]
    assert [len(specs) for specs in chain.boundaries] == [2, 2, 1, 1]
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(form.call(model, tensors).sum(), list(parameters.values()))
    found = torch.autograd.grad(chain(X, Y).sum(), list(parameters.values()))
    assert torch.equal(chain(X, Y), form.call(model, tensors))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_samples_that_hold_something_else_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        CallForm.of({"x": X, "note": {"text": "abc"}}, Two())
    assert str(caught.value) == "a sample holds a str ('note.text'); give tensors, or tuples and dicts of tensors"


def test_inputs_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(
        Exception, match=r"model Two does not run on samples of 'x' \(4,\) float32, 'y' \(4,\) float32 in train mode"
    ):
        capture(Two(), (vector(4), vector(4)), call=CallForm.of({"x": X, "y": X}, Two()))


@dataclasses.dataclass
class Output:
    logits: Any
    hidden: Any = None
    scale: int = 2


class Pair(NamedTuple):
    logits: Any
    hidden: Any


@dataclasses.dataclass
class ModelOutput(OrderedDict[str, Any]):
    """A dict that is a dataclass, as the outputs of transformers are."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        self.update({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda s, h: (s, h), ("0", "1")),
        (lambda s, h: [s, (h, None)], ("0", "1.0")),
        (lambda s, h: {"logits": s, "more": {"hidden": [h], "rate": 0.5}}, ("logits", "more.hidden.0")),
        (Output, ("logits", "hidden")),
        (Pair, ("logits", "hidden")),
        (ModelOutput, ("logits", "hidden")),
        (lambda s, h: {"logits": s}, ("logits",)),
    ],
    ids=["tuple", "list", "dict", "dataclass", "namedtuple", "model output", "one"],
)
def test_outputs_come_back_as_the_model_gives_them(make: Any, names: tuple[str, ...]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        hidden = m.a(x).relu()
        return make(m.c(hidden), hidden)

    model = FromFunction(forward, a=nn.Linear(4, 4), c=nn.Linear(4, 2))
    chain = capture(model, vector(4))
    assert chain.output_form is not None
    assert chain.output_form.names == names
    assert [spec.shape for spec in chain.boundaries[-1]] == [(2,), (4,)][: len(names)]
    found, expected = chain(X), model(X)
    assert type(found) is type(expected)
    assert repr(found) == repr(expected)


def test_a_leaf_that_returns_a_tuple_is_taken_apart() -> None:
    model = FromFunction(lambda m, x: m.lstm(x), lstm=nn.LSTM(4, 3, batch_first=True))
    with pytest.raises(Exception, match=r"returns a tensor '1.0' of shape \(1, 2, 3\) for a batch of 2; its first axis must be"):
        capture(model, vector(5, 4))

"""State outside of a model's modules: what is noticed of it, and what is let be."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.training.outer_state import OuterState

CALLS = {"forward": 0}
TOTAL = torch.zeros(3)
TABLES: dict[int, Tensor] = {}


class Counted(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x


class Own(nn.Module):
    """Does what it is given."""

    def __init__(self, work: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.work = work

    def forward(self, x: Tensor) -> Tensor:
        return self.work(x)


class Backwards(torch.autograd.Function):
    number = 0

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        Backwards.number += 1
        return gradients[0]


def counts_globally(x: Tensor) -> Tensor:
    CALLS["forward"] += 1
    return x


def adds_up(x: Tensor) -> Tensor:
    TOTAL.add_(1)
    return x


def counts_around() -> Callable[[Tensor], Tensor]:
    number = 0

    def work(x: Tensor) -> Tensor:
        nonlocal number
        number += 1
        return x

    return work


def hooked() -> nn.Module:
    model, seen = nn.Linear(3, 3), [0]

    def count(gradient: Tensor) -> None:
        seen[0] += 1

    model.weight.register_hook(count)
    return model


class Schedule:
    """An object that is called, and counts its calls."""

    calls: int
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


SCHEDULE, DRAWS = Schedule(), np.random.RandomState(0)

OUTSIDE = {
    "Counted.calls": Counted,
    f"the global 'CALLS' of {__name__}": lambda: Own(counts_globally),
    f"the global 'TOTAL' of {__name__}": lambda: Own(functools.partial(adds_up)),
    "the variable 'number' around counts_around.<locals>.work": lambda: Own(counts_around()),
    f"the global 'SCHEDULE' of {__name__}": lambda: Own(lambda x: SCHEDULE(x)),
    f"the global 'DRAWS' of {__name__}": lambda: Own(lambda x: x + DRAWS.rand()),
    "Backwards.number": lambda: Own(lambda x: Backwards.apply(x)),
    "the variable 'seen' around hooked.<locals>.count": hooked,
}


@pytest.mark.parametrize("place", OUTSIDE)
def test_what_a_forward_or_a_backward_changes_outside_is_named(place: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), OUTSIDE[place]())
    before = OuterState(model)
    assert before.changed(model) == []
    model(torch.rand(2, 3)).sum().backward()
    assert before.changed(model) == [place]


def test_code_of_libraries_and_what_is_computed_once_are_no_state() -> None:
    def by_table(x: Tensor) -> Tensor:
        return x + TABLES.setdefault(x.shape[1], torch.arange(x.shape[1]).float())

    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), Own(by_table))
    model(torch.rand(2, 3))
    before = OuterState(model)
    model(torch.rand(2, 3)).sum().backward()
    assert before.changed(model) == []

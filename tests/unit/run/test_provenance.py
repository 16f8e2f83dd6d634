"""Provenance: a hash of code is another one for other code; what differs is refused or said."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.run.provenance import _code_hash, _code_of, check_provenance

BEGAN = {
    "model": "a",
    "loss": "b",
    "hooks": "",
    "device": "cpu",
    "hashes": "1",
    "torch": "2",
    "python": "3",
    "cpu": "AVX2",
    "threads": "4",
}


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: function(*values)


class Scaled:
    """A loss that is called, or whose method is."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.own = factor, [self]

    def by_name(self, outputs: Any, targets: Any) -> Any:
        return self.factor * (outputs - targets)

    def __call__(self, outputs: Any, targets: Any) -> Any:
        return outputs - targets


def first(outputs: Any, targets: Any, reduction: str = "sum") -> Any:
    """Say something."""
    return outputs if reduction in {"mean", "sum", "none"} else targets


def first_again(outputs: Any, targets: Any, reduction: str = "sum") -> Any:
    """Say something else."""
    return outputs if reduction in {"mean", "sum", "none"} else targets


def second(outputs: Any, targets: Any, reduction: str = "sum") -> Any:
    return targets if reduction in {"mean", "sum", "none"} else outputs


def test_a_hash_of_code_is_that_of_what_is_done() -> None:
    assert _code_hash(first) == _code_hash(first_again) != _code_hash(second)
    assert _code_hash(wrapped(first)) == _code_hash(wrapped(first_again)) != _code_hash(wrapped(second))
    assert _code_hash(functools.partial(first, reduction="mean")) != _code_hash(functools.partial(first, reduction="none"))
    assert (
        _code_hash(Scaled(2.0).by_name) == _code_hash(Scaled(3.0).by_name) != _code_hash(Scaled(2.0)) != _code_hash(Scaled(3.0))
    )
    weighed = [nn.CrossEntropyLoss(torch.tensor([1.0, value])) for value in (2.0, 2.0, 3.0)]
    assert _code_hash(weighed[0]) == _code_hash(weighed[1]) != _code_hash(weighed[2])
    assert _code_hash(nn.Linear(2, 1)) == _code_hash(nn.Linear(2, 1)), "values that training changes do not count"
    kinds = [Scaled(), nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), nn.functional.huber_loss, torch.dist]
    assert len(set(map(_code_hash, kinds))) == len(kinds)


def test_a_hash_of_code_does_not_go_by_the_order_of_sets() -> None:
    # Which follows from a seed of the process.
    found = _code_of({"mean", "sum", "none"}, set())
    assert found == sorted(found)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, None),
        ({"threads": "2"}, "resumed with threads: 2 (before: 4); last bits may differ from those of a run that was left alone"),
        ({"torch": "9", "model": "x"}, "resumed with torch 9 (before: 2); last bits .*; what the model does differs too, by these or by"),
        ({"hashes": "9", "model": "x", "loss": "x"}, None),
        ({"python": "9", "loss": "x"}, None),
    ],
)  # fmt: skip
def test_what_may_change_last_bits_is_said(changed: dict[str, str], text: str | None) -> None:
    found = check_provenance(BEGAN, {**BEGAN, **changed}, Path("runs/a"), "net")
    assert (found is None) == (text is None)
    assert text is None or re.match(re.escape(text).replace(r"\.\*", ".*"), found or "")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"model": "x"}, "^the model net does not compute what it did when the run in runs/a began: its code, or a package"),
        ({"loss": "x", "threads": "2"}, "^the loss is not the code that the run in runs/a began with"),
        ({"hooks": "x"}, "^the hooks on parameters are not the code that the run in runs/a began with"),
        ({"device": "cuda"}, "^the run in runs/a began on the CPU, for which it was planned, and this is a GPU; resume it there"),
    ],
)
def test_another_model_loss_or_device_is_refused(changed: dict[str, str], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        check_provenance(BEGAN, {**BEGAN, **changed}, Path("runs/a"), "net")


def test_runs_of_earlier_versions_go_on() -> None:
    assert check_provenance({}, BEGAN, Path("runs/a"), "net") is None
    older = {"model": "x", "loss": "x", "device": "cpu", "cpu": "AVX512"}
    on_gpu = {name: value for name, value in BEGAN.items() if name not in ("cpu", "threads")}
    assert check_provenance(older, on_gpu, Path("runs/a"), "net") is None

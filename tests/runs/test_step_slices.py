"""Exact training whose steps take a few elements at a time, and whose tensors are larger than the streams: still the same bits."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from helpers.displays import StopsAt
from helpers.exact_runs import COMMON, check_equal, fit
from helpers.plainloops import assert_same_weights, loaded, train_by_exact
from helpers.small_networks import small_gpt, tokens, vectors
from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.errors import Stopped
from lowmem_pnn.optim import step_slices
from lowmem_pnn.optim.optimizers import OptimizerSpec

SHORT = {**COMMON, "epochs": 1}


def wide() -> nn.Module:
    """Weights of 8 and 18 slices, whose last is not whole; the wide one is larger than the streams."""
    return nn.Sequential(nn.Linear(12, 41), nn.ReLU(), nn.Linear(41, 27), nn.ReLU(), nn.Linear(27, 4))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    of_budget = BufferSizes.of_budget.__func__  # type: ignore[attr-defined]

    def small(cls: type[BufferSizes], budget_bytes: int) -> BufferSizes:
        return dataclasses.replace(of_budget(cls, budget_bytes), stream_bytes=1024, slice_elements=64)

    monkeypatch.setattr(BufferSizes, "of_budget", classmethod(small))
    monkeypatch.setattr(step_slices, "SLICE_UNIT", 64)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "weight_decay": 0.02},
        {"optimizer": "adamw", "fused": False, "weight_decay": 0.02, "micro_batch": 4},
        {"optimizer": "adam", "clip_norm": 0.3},
        {"optimizer": "sgd", "momentum": 0.8, "micro_batch": 4, "clip_norm": 0.3},
        {"optimizer": "sgd", "momentum": 0.0},
    ],
    ids=["adamw", "loops", "clipped", "sgd", "no-state"],
)
@pytest.mark.parametrize("cuts", ["", "1,2"])
def test_steps_by_slices_are_same_as_plain_pytorch(cuts: str, options: dict[str, Any], tmp_path: Path) -> None:
    where = {"cuts": cuts} if cuts else {"partitions": 1}
    check_equal(wide, vectors(), tmp_path / "run", **SHORT, **options, **where)


@pytest.mark.parametrize(
    "options",
    [{"cuts": "1,2,3"}, {"cuts": "2", "clip_norm": 0.1}, {"cuts": "2", "clip_norm": 0.1, "micro_batch": 4}],
    ids=["cut", "clipped", "micro-batches"],
)
def test_steps_of_tied_weights_by_slices_are_same_as_plain_pytorch(options: dict[str, Any], tmp_path: Path) -> None:
    check_equal(functools.partial(small_gpt, tied=True), tokens(), tmp_path / "run", **SHORT, **options)


def test_steps_by_slices_in_fp16_are_same_as_plain_pytorch(tmp_path: Path) -> None:
    # Steps wait for all gradients, and the first ones are left out, but written.
    options = {**COMMON, "precision": "fp16", "cuts": "1,2"}
    result = fit(wide, vectors(), tmp_path / "run", **options)
    assert_same_weights(loaded(wide, result.weights_file), train_by_exact(wide, vectors(), **options).model)


@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_a_resume_between_steps_by_slices_changes_nothing(clip_norm: float | None, tmp_path: Path) -> None:
    options = {**SHORT, "optimizer": "adamw", "cuts": "1,2", "clip_norm": clip_norm, "commit_every": 0.0, "log_every": 1}
    with pytest.raises(Stopped):
        fit(wide, vectors(), tmp_path / "run", display=StopsAt(2), **options)
    result = fit(wide, vectors(), tmp_path / "run", resume=True, **options)
    assert result.resumed == 1
    assert_same_weights(loaded(wide, result.weights_file), train_by_exact(wide, vectors(), **options).model)


def test_the_budget_decides_the_slices_and_nothing_else() -> None:
    spec, parameters = OptimizerSpec("adamw"), dict(wide().named_parameters())
    for most in (64, 128, 1 << 20):
        parts = [part for step in step_slices.step_slices(parameters, most) for part in step]
        assert [name for name, _ in itertools.groupby(part.name for part in parts)] == list(parameters)
        assert step_slices.largest_state_bytes(spec, parameters, most) == min(
            8 * most, 8 * sum(p.numel() for p in parameters.values())
        )

"""Weights and optimizer state that stay in memory where a sweep's budget has room: the bits are those of a plain loop all the same."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import lowmem_pnn
from helpers.displays import StopsAt
from helpers.exact_runs import COMMON, check_equal, fit
from helpers.plainloops import assert_same_weights, loaded, train_by_exact
from helpers.small_networks import images, small_conv, small_gpt, tokens, vectors
from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.errors import Stopped
from lowmem_pnn.optim import step_slices
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning import batch_plan
from lowmem_pnn.planning.resident_state import with_resident_state
from lowmem_pnn.reporting.progress import Display

pytestmark = pytest.mark.resident


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 41), nn.ReLU(), nn.Linear(41, 27), nn.ReLU(), nn.Linear(27, 4))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that were made."""
    made: list[Plan] = []

    def remembered(request: Any, plan: Plan) -> Plan:
        made.append(with_resident_state(request, plan))
        return made[-1]

    monkeypatch.setattr(batch_plan, "with_resident_state", remembered)
    return made


def keep_only(monkeypatch: pytest.MonkeyPatch, weights: tuple[int, ...], state: tuple[int, ...]) -> None:
    """Have the weights and the state of these layers alone stay."""

    def some(request: Any, plan: Plan) -> Plan:
        return dataclasses.replace(plan, resident_weights=weights, resident_state=state)

    monkeypatch.setattr(batch_plan, "with_resident_state", some)


@pytest.mark.parametrize(
    "options",
    [
        {"partitions": 1},
        {"cuts": "2,3", "micro_batch": 4},
        {"cuts": "2", "clip_norm": 0.1},
        {"cuts": "2", "optimizer": "sgd", "momentum": 0.9, "commit_every": 0.0},
    ],
    ids=["one", "three", "clipped", "sgd"],
)
def test_where_all_stays_the_bits_are_those_of_plain_pytorch(options: dict[str, Any], tmp_path: Path, plans: list[Plan]) -> None:
    check_equal(small_conv, images(), tmp_path / "run", {"smallest": 2}, **COMMON, **options)
    plan = plans[-1]
    trainable = {layer for part in plan.partitions for layer in range(part.start, part.stop)}
    assert set(plan.resident_weights) == set(plan.resident_state) <= trainable
    assert plan.resident_bytes > 0


@pytest.mark.parametrize(
    ("weights", "state"), [((0, 2), ()), ((), (0, 4)), ((0, 1, 2, 3, 4), (2,))], ids=["weights", "state", "both"]
)
@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_where_some_of_it_stays_or_is_stepped_in_slices_too(
    clip_norm: float | None, weights: tuple[int, ...], state: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_budget = BufferSizes.of_budget.__func__  # type: ignore[attr-defined]

    def small(cls: type[BufferSizes], budget_bytes: int) -> BufferSizes:
        return dataclasses.replace(of_budget(cls, budget_bytes), stream_bytes=1024, slice_elements=64)

    monkeypatch.setattr(BufferSizes, "of_budget", classmethod(small))
    monkeypatch.setattr(step_slices, "SLICE_UNIT", 64)
    keep_only(monkeypatch, weights, state)
    check_equal(wide, vectors(), tmp_path / "run", **{**COMMON, "cuts": "2", "clip_norm": clip_norm, "optimizer": "adamw"})


def test_tied_weights_move_and_the_rest_stays(tmp_path: Path, plans: list[Plan]) -> None:
    build = functools.partial(small_gpt, tied=True)
    check_equal(build, tokens(), tmp_path / "run", cuts="2", **{**COMMON, "epochs": 1})
    last = plans[-1].partitions[-1].stop - 1
    assert plans[-1].resident_state
    assert not {0, last} & {*plans[-1].resident_weights, *plans[-1].resident_state}


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    options = {**COMMON, "cuts": "2", "commit_every": 0.0, "log_every": 1}
    display = StopsAt()
    whole = fit(small_conv, images(), tmp_path / "whole", display=display, **options)
    with pytest.raises(Stopped):
        fit(small_conv, images(), tmp_path / "run", display=StopsAt(display.count * 2 // 3), **options)
    result = fit(small_conv, images(), tmp_path / "run", resume=True, **options)
    assert result.resumed == 1
    assert_same_weights(loaded(small_conv, result.weights_file), loaded(small_conv, whole.weights_file))


class FillsUp(nn.Module):
    """A layer that finds no memory for more than 6 samples, once another process has taken it."""

    is_full = False

    def forward(self, x: Tensor) -> Tensor:
        if FillsUp.is_full and len(x) > 6:
            raise MemoryError("no room")
        return x


class Fills(Display):
    """Has the memory taken when the second epoch begins."""

    def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
        FillsUp.is_full = epoch == 1


def test_a_batch_that_does_not_fit_is_done_again_on_the_weights_that_were_there(tmp_path: Path, plans: list[Plan]) -> None:
    def build() -> nn.Module:
        # The first two partitions may have been stepped when the third finds no room.
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), FillsUp(), nn.Linear(16, 4))

    options = {**COMMON, "batch_size": 12, "cuts": "1,2", "micro_batch": 12}
    try:
        result = fit(build, vectors(), tmp_path / "run", display=Fills(), **options)
    finally:
        FillsUp.is_full = False
    assert plans[0].resident_weights
    assert result.oom_retries == 1
    # The second epoch is announced in the third of six steps.
    expected = train_by_exact(build, vectors(), **options, micro_batch_of=lambda step: 12 if step < 2 else 6)
    assert_same_weights(loaded(build, result.weights_file), expected.model)


def test_what_stays_is_not_moved_and_the_plan_and_the_forecast_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**COMMON, "val_fraction": 0.0, "cuts": "2", "commit_every": 1e6, "epochs": 8}
    moved = {}
    for stays in (True, False):
        if not stays:
            keep_only(monkeypatch, (), ())
        result = fit(wide, vectors(), tmp_path / str(stays), **options)
        moved[stays] = result.bytes_written
    # 32 batches write weights and state again and again; what stays is written once, for the last commit.
    assert moved[True] < moved[False] / 3

    def planned(**more: Any) -> lowmem_pnn.PlanReport:
        return lowmem_pnn.plan(
            "mlp:64-512-512-512-10", "digits", method="exact", batch_size=64, cuts="1,2,3", device="cpu", timing=False, **more
        )

    def said(report: lowmem_pnn.PlanReport) -> list[str]:
        return [note for note in report.notes if "to stay in memory" in note]

    monkeypatch.undo()
    roomy, tight = planned(max_gpu_mem="200MB"), planned(max_gpu_mem="40MB")
    assert said(roomy)[0].startswith(
        "there is room for the weights of all of 4 layers and the optimizer state of all of 4 layers"
    )
    assert roomy.predicted_peak_bytes > tight.predicted_peak_bytes
    assert roomy.disk_bytes == tight.disk_bytes

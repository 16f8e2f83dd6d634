"""Computation: multiply-accumulates up to a place in a program, against sums by hand."""

from typing import Any

import pytest

from helpers.counted_plans import SAMPLES, config, plan
from lowmem_pnn.methods import Sweep, Visit, make_method, visits_of_rank
from lowmem_pnn.methods.macs import macs_until, program_macs, samples_learnt


def program(**options: Any) -> list[Visit | Sweep]:
    return make_method(config(**options)).program(3, ["train", "val"])


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        # visit, finished epochs of it, samples of the epoch under way; per sample
        ((0,), 0),
        ((0, 0, 20), 100 * 20),
        ((0, 1, 20), 100 * 70),
        ((0, 2, 49), 100 * 149),
        ((1,), 300 * 50),
        ((1, 1), 400 * 50),
        ((2,), 400 * 50),
        ((2, 1), 400 * 50),  # the validation samples are not trained on
        ((3, 0, 1), 400 * 50 + 10),
        ((4,), 410 * 50),
        ((6,), 420 * 50),
        ((6, 1, 10), 421 * 50 + 10),
        ((7,), 422 * 50),
    ],
)
def test_pnn_counts_learning_and_what_is_written(place: tuple[int, ...], expected: int) -> None:
    assert macs_until(program(epochs=(3, 1, 2)), plan(), SAMPLES, *place) == expected


def test_without_activations_only_learning_counts() -> None:
    items = program(epochs=(3, 1, 2), parallel_sil=True)
    assert [macs_until(items, plan(), SAMPLES, visit) for visit in range(4)] == [0, 300 * 50, 310 * 50, 312 * 50]
    assert macs_until(items, plan(), SAMPLES, 2, 1, 7) == 311 * 50 + 7


@pytest.mark.parametrize(
    ("options", "each"),
    [
        # All but the last run forward twice; a step runs nothing.
        ({}, 221),
        ({"clip_norm": 1.0}, 221),
    ],
)
def test_exact_counts_what_runs_forward_once_more(options: dict[str, Any], each: int) -> None:
    items = program(method="exact", epochs=4, **options)
    assert program_macs(items, plan(), SAMPLES) == 4 * 50 * each
    assert macs_until(items, plan(), SAMPLES, 0, 3, 8) == (3 * 50 + 8) * each


@pytest.mark.parametrize(("recover", "each"), [((1,), 221), ((2,), 121), ((3,), 111), ((1, 3), 221), ("all", 221), (None, 221)])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"parallel_sil": True}], ids=["plain", "clipped", "parallel"])
def test_recovery_counts_from_the_first_partition_that_learns(recover: Any, each: int, options: dict[str, Any]) -> None:
    without = program_macs(program(epochs=2, **options), plan(), SAMPLES)
    assert without == (222 if "parallel_sil" in options else 222 + 110) * 50
    items = program(epochs=2, recovery_epochs=3, recover=recover, **options)
    assert program_macs(items, plan(), SAMPLES) == without + 3 * 50 * each
    assert macs_until(items, plan(), SAMPLES, len(items) - 1, 1, 9) == without + 59 * each


def test_backprop_counts_the_model_once() -> None:
    items = make_method(config(method="backprop", epochs=3)).program(1, ["train", "val"])
    assert program_macs(items, plan((111,)), SAMPLES) == 3 * 50 * 111


def test_what_several_processes_do_adds_up_to_the_whole() -> None:
    items = program(epochs=(3, 1, 2), parallel_sil=True, recovery_epochs=2)
    each = [program_macs(visits_of_rank(items, rank, 3), plan(), SAMPLES) for rank in range(3)]
    # The first one joins, which computes nothing, and recovers.
    assert each == [(300 + 2 * 221) * 50, 10 * 50, 2 * 50]
    assert sum(each) == program_macs(items, plan(), SAMPLES)


def test_samples_of_several_partitions_count_for_each() -> None:
    assert samples_learnt(program(epochs=(3, 1, 2), recovery_epochs=2), SAMPLES) == (3 + 1 + 2 + 2) * 50
    assert samples_learnt(program(method="exact", epochs=3), SAMPLES) == 3 * 50


@pytest.mark.parametrize("options", [{}, {"parallel_sil": True}, {"recovery_epochs": 2}, {"method": "exact"}])
def test_no_place_has_more_than_a_later_one(options: dict[str, Any]) -> None:
    items = program(epochs=2, **options)
    places = [
        (visit, epoch, done) for visit, item in enumerate(items) for epoch in range(item.epochs) for done in range(SAMPLES + 1)
    ]
    counts = [macs_until(items, plan(), SAMPLES, *place) for place in places]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, program_macs(items, plan(), SAMPLES))

"""Advice on methods, and tables of budgets."""

import dataclasses
from typing import Any

import pytest

from lowmem_pnn.reporting.advice import advise, plain_fits
from lowmem_pnn.reporting.budget_table import describe_budgets
from lowmem_pnn.reporting.method_estimate import MethodEstimate
from lowmem_pnn.reporting.plan_report import PlanReport


def estimates(**seconds: float | None) -> list[MethodEstimate]:
    """Estimates by method: seconds of an epoch, None where it does not fit before 2 GB."""
    return [
        MethodEstimate(method=name, asked=name == "pnn", reason="too much; give more", enough_bytes=2_000_000_000)
        if value is None
        else MethodEstimate(
            method=name, asked=name == "pnn", fits=True, enough_bytes=50_000_000, partitions=3, micro_batches=(16, 32),
            predicted_peak_bytes=90_000_000, seconds_per_epoch=value, measured_share=1.0,
        )
        for name, value in seconds.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ({"pnn": 5.0, "neuroflux": 6.0, "exact": 7.0, "backprop": None}, "take --method exact: ordinary training, 7.00 s an epoch, and no"),
        ({"pnn": 1.0, "exact": 7.0, "backprop": 4.0}, "take --method backprop: ordinary training, 4.00 s an epoch; --method pnn takes 1.00 s"),
        ({"pnn": 2.0, "neuroflux": 1.0, "exact": None}, "take --method neuroflux: ordinary training does not fit, and it is the faster one"),
        ({"pnn": 2.0, "exact": None}, "take --method pnn: ordinary training does not fit, and nothing else does"),
        ({"pnn": None, "exact": 1.0}, "take --method exact: ordinary training, 1.00 s an epoch, and the only one that fits"),
        ({"pnn": None, "exact": None}, "no method fits; the smallest budget is 2.00 GB, with --method pnn"),
    ],
)  # fmt: skip
def test_a_sentence_says_which_method_to_take_and_why(seconds: dict[str, float | None], text: str) -> None:
    assert advise(estimates(**seconds)).startswith(text)


def test_plain_pytorch_comes_first_where_it_fits() -> None:
    assert plain_fits(60, 5, 100)
    assert not plain_fits(70, 5, 100)
    assert not plain_fits(None, 5, 100)
    assert advise(estimates(pnn=1.0, backprop=2.0), plain_fits=True).startswith(
        "take plain PyTorch: it fits this budget, or --method backprop"
    )


def report(budget: int, **changes: Any) -> PlanReport:
    plan = PlanReport(
        method="pnn", model="m", data="d", device="cpu", budget_bytes=budget, reserve_bytes=100, training_state_bytes=80,
        plain_bytes=700_000_000, predicted_peak_bytes=200, disk_bytes=50, partitions=[], fits=True, reason="", exit_code=0,
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


def test_budgets_are_set_side_by_side() -> None:
    text = describe_budgets([
        report(100_000_000, prospects=estimates(pnn=2.0, exact=None)),
        report(10**9, prospects=estimates(pnn=2.0, exact=2.5)),
    ])  # fmt: skip
    lines = text.splitlines()
    assert lines[2] == "plain PyTorch needs about 700.0 MB"
    assert [line.split()[:3] for line in lines[6:10]] == [
        ["100.0", "MB", "pnn"], ["exact", "does", "not"], ["1.00", "GB", "pnn"], ["exact", "3", "16"],
    ]  # fmt: skip
    assert lines[-2] == "100.0 MB: take --method pnn: ordinary training does not fit, and nothing else does"
    assert lines[-1].startswith("1.00 GB: take --method exact")


def test_incubation_is_named_beside_a_faster_partitioned_method() -> None:
    text = advise(estimates(pnn=1.0, incubate=2.0, exact=7.0))
    assert "; --method incubate (2.00 s, after its thin model) came nearest to ordinary training" in text
    assert "incubate" not in advise(estimates(pnn=1.0, exact=7.0))
    assert advise(estimates(incubate=1.0, exact=None)).count("incubate") == 1

"""Reports of plans as text and JSON."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lowmem_pnn.reporting.method_estimate import MethodEstimate
from lowmem_pnn.reporting.plan_report import PlanReport


def plan_report(**changes: Any) -> PlanReport:
    partition: Mapping[str, Any] = {
        "layers": ["0"], "params": 5, "micro_batch": 2, "batch": 4, "state_bytes": 100, "predicted_peak_bytes": 200,
        "activation_bytes": 0,
    }  # fmt: skip
    report = PlanReport(
        method="pnn", model="m", data="d", device="cpu", budget_bytes=1000, reserve_bytes=100, training_state_bytes=80,
        predicted_peak_bytes=200, disk_bytes=50, partitions=[partition], fits=True, reason="", exit_code=0,
    )  # fmt: skip
    return dataclasses.replace(report, **changes)


def test_a_plan_says_whether_it_fits() -> None:
    assert str(plan_report()).endswith("fits: predicted peak 200 B and a reserve of 100 B within 1.0 kB")
    refused = plan_report(fits=False, reason="layer 'x' alone needs more", partitions=[])
    assert str(refused).endswith("does not fit: layer 'x' alone needs more")
    assert json.loads(refused.to_json())["fits"] is False


def test_a_plan_says_what_is_written_and_which_share_of_the_drives_rating_that_is() -> None:
    written = plan_report(written_bytes=3 * 10**12)
    assert "\ndisk: at most 50 B, 3.00 TB written in training\n" in str(written)
    rated = dataclasses.replace(written, drive_tbw=600.0)
    assert "\ndisk: at most 50 B, 3.00 TB written in training, 0.5% of the drive's 600 TB\n" in str(rated)


def test_a_method_that_cannot_is_explained_below_the_table_within_the_terminal() -> None:
    prospects = [
        MethodEstimate(
            method="pnn", asked=False, reason="--method pnn needs a class for each sample, and data book has tokens; give exact"
        ),
        MethodEstimate(method="exact", asked=True, reason="too little", enough_bytes=2_000),
    ]
    text = plan_report(prospects=prospects).describe(70)
    assert "pnn cannot: --method pnn needs a class for each sample, and data book\n  has tokens\n" in text
    assert max(map(len, text.splitlines())) <= 70
    assert "\n\n\n" not in text

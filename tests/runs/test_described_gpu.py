"""Plans for a GPU that is not here."""

import json

import pytest

from helpers.commands import lowmem_pnn
from lowmem_pnn.api import plan
from lowmem_pnn.errors import BudgetError

MODEL = "mlp:64-2048-2048-2048-2048-10"
LINE = f"plan --device cuda --val-fraction 0 --model {MODEL} --data digits --method exact --partitions 3 --batch-size 128"


def tiers(gpu: str) -> dict[str, dict[str, float]]:
    done = lowmem_pnn(f"{LINE} --gpu {gpu} --no-timing --json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["device"] == "a GPU of 8.00 GB, as described"
    assert report["budget_bytes"] == 8 * 10**9
    return {tier.pop("tier"): tier for tier in report["tiers"]}


def test_seconds_follow_from_the_description() -> None:
    usual, slow_bus, slow_disk, fast = map(tiers, ("8GB", "8GB,pcie=1,disk=1", "8GB,disk=0.5", "8GB,tflops=100,ram=16MB"))
    order = ["device memory", "host RAM", "disk"]
    assert list(usual) == order
    for found in (usual, slow_bus, slow_disk, fast):
        seconds = [found[tier]["seconds_per_step"] for tier in order]
        assert 0 < seconds[0] < seconds[1] <= seconds[2]
    assert slow_bus["host RAM"]["seconds_per_step"] > 3 * usual["host RAM"]["seconds_per_step"]
    assert slow_disk["host RAM"] == usual["host RAM"]
    assert slow_disk["disk"]["seconds_per_step"] > 2 * usual["disk"]["seconds_per_step"]
    assert fast["device memory"]["seconds_per_step"] < usual["device memory"]["seconds_per_step"]
    # Weights and two moments of AdamW, and its counts of steps.
    assert usual["host RAM"]["needs_bytes"] == pytest.approx(12 * (64 * 2048 + 3 * 2048**2 + 2048 * 10 + 4 * 2048 + 10), rel=0.01)
    assert (usual["host RAM"]["has_bytes"], fast["host RAM"]["has_bytes"]) == (None, 16_000_000)


def test_the_report_shows_the_tiers_and_all_methods_without_timing_anything() -> None:
    done = lowmem_pnn(f"{LINE} --gpu 8GB,ram=16MB --max-gpu-mem 25%")
    assert done.code == 0, done.err
    assert "weights and state in   seconds per step" in done.out
    assert "16.0 MB   does not fit" in done.out
    assert "nothing was timed: seconds are computed from the description" in done.out
    assert "600.0 MB of the budget are taken for the CUDA context" in done.out
    assert "within 2.00 GB" in done.out
    assert "multiply-accumulates were timed" not in done.out
    assert "neuroflux   fits" in done.out


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (
            "--gpu 8GB --device cpu",
            3,
            "--gpu describes a GPU to plan for, and --device cpu asks for the CPU; leave one of them out",
        ),
        ("--gpu 8", 3, "--gpu: the GPU's memory, which comes first, is 8 bytes, as 8 reads; write 8GB,pcie=12"),
        ("--gpu 8GB --max-gpu-mem 9GB", 4, "--max-gpu-mem 9.00 GB is more than the device has, 8.00 GB; give less"),
        (
            "--gpu 500MB",
            4,
            "a CUDA context alone is taken to hold 600.0 MB on the device, and the budget is 500.0 MB; give more, or",
        ),
    ],
)
def test_what_cannot_be_planned_for_is_one_line(options: str, code: int, text: str) -> None:
    done = lowmem_pnn(f"plan --model {MODEL} --data digits {options}")
    assert (done.code, text in done.fault) == (code, True), done.err


def test_from_python() -> None:
    report = plan(MODEL, "digits", gpu="2GB", method="exact", timing=False)
    assert [tier.tier for tier in report.tiers] == ["device memory", "host RAM", "disk"]
    assert (report.budget_bytes, report.fits) == (2_000_000_000, True)
    scoped = plan(MODEL, "digits", gpu="2GB", max_gpu_mem="300MB", method="exact", timing=False, budget_scope="allocator")
    assert scoped.fits
    with pytest.raises(BudgetError, match=r"taken to hold 600\.0 MB"):
        plan(MODEL, "digits", gpu="2GB", max_gpu_mem="300MB", method="exact", timing=False)

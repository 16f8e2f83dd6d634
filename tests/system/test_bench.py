"""The command `bench`: contenders in processes of their own, watched from outside."""

import json
from pathlib import Path

import pytest

from helpers.commands import lowmem_pnn, write_data

pytestmark = pytest.mark.usefixtures("data_folder")

BENCH = "bench --model mlp:20-1500-1500-3 --data npz:data.npz --device cpu --batch-size 32 --steps 3"


def test_a_method_and_plain_pytorch_are_measured_side_by_side() -> None:
    done = lowmem_pnn(
        f"{BENCH} --budgets 80M --methods exact --baselines plain,checkpointing --json --csv rows.csv --html page.html"
    )
    assert done.code == 0, done.err
    assert [line for line in done.err.splitlines() if " in " in line or line in ("plain", "checkpointing")][-3:] == [
        "exact in 80.0 MB", "plain", "checkpointing",
    ]  # fmt: skip
    exact, plain, checkpointing = json.loads(done.out)["rows"]
    assert exact["fits"]
    # The meter inside of the process, and the one outside of it, agree.
    assert 5e6 < exact["peak_bytes"] <= 80e6
    state = 16 * (20 * 1500 + 1500 * 1500 + 1500 * 3)  # weights, gradients and two moments of AdamW
    for row in (plain, checkpointing):
        assert state < row["peak_bytes"] < 1.6 * state
    assert plain["speed"] == 1.0
    assert all(row["samples_per_second"] > 0 for row in (exact, plain, checkpointing))
    assert abs(plain["predicted_peak_bytes"] / plain["peak_bytes"] - 1) < 0.3
    assert Path("rows.csv").read_text().count("\n") == 4
    assert "<svg" in Path("page.html").read_text()


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("bench --model mlp:20-3 --data digits", 2, "--budgets is missing; give --budgets 1GB,500MB"),
        ("bench --data digits --budgets 1G", 2, "--model is missing; give --model mlp:64-2048-2048-10"),
        ("bench --model mlp:20-3 --data digits --budgets 1G --max-gpu-mem 1G", 2, "exclude each other; give one"),
        ("bench --model mlp:20-3 --data digits --budgets 1G --methods exat", 3, "--methods 'exat' is none of pnn, neuroflux"),
        ("bench --model mlp:20-3 --data digits --budgets 1G --baselines simple", 3, "--baselines 'simple' is none of plain"),
        ("bench --model mlp:20-3 --data digits --budgets 1G --batch-size auto", 3, "--batch-size auto"),
    ],
)
def test_what_cannot_be_measured_is_said(line: str, code: int, text: str, data_folder: Path) -> None:
    write_data(data_folder / "data.npz")
    done = lowmem_pnn(line)
    assert (done.code, text in done.fault) == (code, True), done.err


def test_faults_are_json_too() -> None:
    done = lowmem_pnn(
        "fit --max-gpu-mem 20M --device cpu --model mlp:20-3000-3000-3 --data npz:data.npz --method backprop --json --quiet"
    )
    assert done.code == 4
    body = json.loads(done.out)
    assert body["exit_code"] == 4
    assert body["enough_bytes"] > 100_000_000
    assert done.err.rstrip().endswith(body["error"])

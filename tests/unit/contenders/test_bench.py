"""The bench without its processes: what contenders are asked to do, which are not run, and how they end."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.commands import lowmem_pnn
from lowmem_pnn.cli.bench_command import _ended_by_signals
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.contenders import bench as benches
from lowmem_pnn.contenders.bench_report import BenchRow
from lowmem_pnn.contenders.outside_meter import OutsideMeter
from lowmem_pnn.errors import DataError

pytestmark = pytest.mark.usefixtures("data_folder")

Asked = list[tuple[str, int, Any]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Methods, budgets and configurations of the contenders that would run; all of them cannot."""
    asked: Asked = []

    def run_method(config: Any, method: str, budget: int, *_: Any) -> tuple[BenchRow, dict[str, Any]]:
        asked.append((method, budget, config))
        return BenchRow(contender=method, budget_bytes=budget, reason="no", exit_code=3), {}

    monkeypatch.setattr(benches, "_run_method", run_method)
    return asked


def bench(data: str, **options: Any) -> Any:
    given = {"budgets": ["1GB"], "methods": "exact", "baselines": "none", "batch_size": 32, **options}
    return benches.bench("mlp:20-16-3", data, **given)


def test_a_test_part_is_cut_short_where_there_is_one(asked: Asked) -> None:
    with np.load("data.npz") as file:
        np.savez("one.npz", x=file["x_train"], y=file["y_train"])
    bench("npz:data.npz")
    bench("npz:one.npz")
    assert [config.test_limit for _, _, config in asked] == [1, None]


def test_steps_are_those_that_there_are(asked: Asked) -> None:
    said: list[str] = []
    assert bench("npz:data.npz", steps=100, say=said.append).steps == 4
    assert said == ["4 steps each, and not 100: there are 120 samples to train on", "exact in 1.00 GB"]
    assert bench("npz:data.npz", steps=2).steps == 2
    assert asked[-1][2].train_limit == 64


def test_data_that_no_contender_could_open_is_refused_at_once(asked: Asked) -> None:
    with pytest.raises(DataError, match=r"none\.npz"):
        bench("npz:none.npz")
    assert not asked


# Plain PyTorch that would need more than is free.


def test_what_needs_more_than_is_free_is_not_run_wherever_it_would_be_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("it is started")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benches, "available_bytes", lambda device: 1_000_000)
    places: list[Path] = []

    def note(_: object, method: str, __: int, workdir: Path, *___: object) -> tuple[BenchRow, dict[str, Any]]:
        places.append(workdir)
        return BenchRow(contender=method), {}

    monkeypatch.setattr(benches, "_run_method", note)
    rows = benches.bench("mlp:20-600-600-600-3", "npz:data.npz", budgets=["1GB"], methods="neuroflux", batch_size=32).rows
    assert [place.parent.parent for place in places] == [Path.cwd()], "temporary files may lie in memory"
    assert not [*Path.cwd().glob(".lowmem*")]
    state = 16 * (20 * 600 + 2 * 600 * 600 + 600 * 3)
    for row in rows[1:]:
        assert row.reason.startswith(f"it needs about {row.predicted_peak_bytes / 1e6:.1f} MB, and 1.0 MB are free")
        assert state < row.predicted_peak_bytes < 1.3 * state
        assert row.verdict == "does not fit"


def test_lists_for_partitions_are_refused_for_plain_pytorch() -> None:
    config = FitConfig(max_gpu_mem="1GB", model="mlp:20-3", data="npz:data.npz", method="backprop", optimizer="sgd,adam")
    row = benches._run_baseline(config, "plain", Path(), 10**9, None)
    assert (row.exit_code, row.verdict) == (3, "cannot")
    assert row.reason.startswith("--optimizer has 2 values, and there is 1 partition")


# How it ends.


def test_a_contender_ends_with_whatever_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "_PATIENCE", 0.2)

    def end(*_: object) -> None:
        sys.exit(143)

    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: time.sleep(0.1)); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(SystemExit):
            benches._watched(process, OutsideMeter(process.pid))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert process.returncode == -signal.SIGKILL


def test_the_command_ends_by_an_exception_when_it_is_asked_to() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, _ended_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


# The command.

LINE = "bench --model mlp:20-16-3 --data npz:data.npz --baselines none --batch-size 32"


def test_contenders_that_cannot_all_of_them_are_no_matter_of_the_budget(asked: Asked) -> None:
    done = lowmem_pnn(f"{LINE} --budgets 1G --methods exact,pnn --csv rows.csv")
    assert done.code == 3
    assert "cannot" in done.out
    assert Path("rows.csv").read_text().startswith("contender,")


@pytest.mark.parametrize("option", ["--csv", "--html", "--svg"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(option: str, asked: Asked) -> None:
    done = lowmem_pnn(f"{LINE} --budgets 1G {option} none/x")
    assert (done.code, done.fault) == (5, f"cannot write {option} none/x: no such file or directory; give another place")
    assert not asked


def test_the_file_of_a_run_is_taken_as_far_as_it_is_of_use(asked: Asked) -> None:
    Path("config.toml").write_text(
        'max_gpu_mem = "5MB"\nmodel = "mlp:20-16-3"\ndata = "npz:data.npz"\nmethod = "exact"\nepochs = [7]\nval_fraction = 0.5\nlr = [0.5]\n'
    )
    done = lowmem_pnn("bench --config config.toml --budgets 1G,2G --baselines none")
    assert "left out of --config, since contenders take a few training steps alone: --epochs, --val-fraction" in done.err
    assert [(method, budget) for method, budget, _ in asked] == [("exact", 10**9), ("exact", 2 * 10**9)]
    assert {(config.epochs, config.val_fraction, config.lr) for _, _, config in asked} == {((1,), 0.0, (0.5,))}
    lowmem_pnn("bench --config config.toml --methods pnn,exact --baselines none")
    assert [(method, budget) for method, budget, _ in asked[2:]] == [("pnn", 5 * 10**6), ("exact", 5 * 10**6)]
    plan = lowmem_pnn("plan --config config.toml --budgets 100M,200M --no-timing --json --device cpu")
    assert (plan.code, plan.out.count('"budget_bytes"') > 1) == (0, True), plan.err
    assert lowmem_pnn(f"{LINE} --budgets 1G --method exact --methods pnn").fault.startswith(
        "--method and --methods exclude each other; give one"
    )
    assert lowmem_pnn(f"{LINE} --budgets 1G --epochs 3").fault.startswith("--epochs has no effect here")

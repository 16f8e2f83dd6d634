"""What a run logs, as others read it: the table of metrics, and loggers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from torch import nn

import lowmem_pnn
from lowmem_pnn.errors import Stopped
from lowmem_pnn.run.metrics_table import COLUMNS
from lowmem_pnn.stores import disk

RANDOM = np.random.default_rng(3)
X = RANDOM.normal(size=(60, 5)).astype(np.float32)
Y = RANDOM.integers(0, 3, 60)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


def fit(folder: Path, **options: Any) -> Any:
    given = {"max_gpu_mem": "1GB", "device": "cpu", "batch_size": 8, "epochs": 2, "log_every": 3, "cuts": "1", **options}
    return lowmem_pnn.fit(build, (X, Y), test=(X, Y), workdir=folder, verbose=False, **given)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class StopsAt(lowmem_pnn.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, info: Mapping[str, Any]) -> None:
        if (info["partition"], info["step"]) == (1, self.step):
            raise Stopped("enough")


def test_the_table_says_what_the_lines_say(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    lines, table = lines_of(tmp_path / "run"), pandas.read_csv(tmp_path / "run" / "metrics.csv")
    assert tuple(table.columns[: len(COLUMNS)]) == COLUMNS
    assert {"step", "train_loss", "split"} <= {name for line in lines for name in line}, "or not every kind of line is tested"
    assert len(table) == len(lines)
    for line, (_, row) in zip(lines, table.iterrows(), strict=True):
        for name, value in line.items():
            if name == "waiting":
                assert {key: row[f"waiting_{key}"] for key in value} == pytest.approx(value)
            elif name != "memory":
                assert (pandas.isna(row[name]) and value is None) or row[name] == value, name
        assert all(pandas.isna(row[name]) for name in COLUMNS if name not in line)
    assert set(table[table["step"].notna()]["partition"]) == {0, 1}, "a step says whose it is"


def test_the_table_of_a_stopped_run_has_what_is_committed(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(tmp_path / "run", callbacks=[StopsAt(11)])
    committed = json.loads((tmp_path / "run" / "journal.json").read_text())["body"]["metrics_bytes"]
    assert 0 < committed < (tmp_path / "run" / "metrics.jsonl").stat().st_size
    stopped = pandas.read_csv(tmp_path / "run" / "metrics.csv")
    assert len(stopped) == len((tmp_path / "run" / "metrics.jsonl").read_bytes()[:committed].splitlines())
    fit(tmp_path / "run", resume=True)
    table = pandas.read_csv(tmp_path / "run" / "metrics.csv")
    assert len(table) == len(lines_of(tmp_path / "run")) > len(stopped)
    fit(tmp_path / "run", overwrite=True, epochs=1)
    assert len(pandas.read_csv(tmp_path / "run" / "metrics.csv")) == len(lines_of(tmp_path / "run")) < len(table)


def test_a_disk_that_refuses_the_table_loses_the_table_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str) -> None:
        if name == "written metrics.csv":
            raise OSError(28, "No space left on device")

    told: list[str] = []

    class Tells(lowmem_pnn.Display):
        def message(self, text: str) -> None:
            told.append(text)

    monkeypatch.setattr(disk, "commit_point", full)
    result = fit(tmp_path / "run", display=Tells())
    assert result.test_accuracy is not None
    assert sorted(path.name for path in (tmp_path / "run").glob("metrics*")) == ["metrics.jsonl"]
    assert any(text.startswith("metrics.csv is left out (") and "space" in text for text in told)

"""What a run logs, as others read it: the table of metrics, and loggers."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from torch import nn

import lowmem_pnn
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.run import loggers
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
    told = (
        "# The options of this run; it was started from Python, with python:build, python:tuple, which lowmem_pnn.fit takes anew"
    )
    assert (tmp_path / "run" / "config.toml").read_text().startswith(told)
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

    display = Tells()
    monkeypatch.setattr(disk, "commit_point", full)
    result = fit(tmp_path / "run", display=display)
    assert result.test_accuracy is not None
    assert sorted(path.name for path in (tmp_path / "run").glob("metrics*")) == ["metrics.jsonl"]
    assert any(text.startswith("metrics.csv is left out (") and "space" in text for text in display.told)


class Notes(loggers.Service):
    """A service that notes what it is told."""

    told: list[tuple[Any, ...]]  # by the test
    fails = False

    def open(self, folder: Path, options: Mapping[str, Any], earlier: str | None) -> tuple[str | None, str]:
        self.told.append(("open", folder.name, options["log_every"], earlier))
        return earlier or "an id", "look here"

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("nobody\nthere")
        self.told.append((group, step, dict(values)))

    def close(self, ending: loggers.Ending) -> None:
        self.told.append(("close", ending))


class Tells(lowmem_pnn.Display):
    def __init__(self) -> None:
        self.told: list[str] = []

    def message(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    monkeypatch.setattr(loggers, "SERVICES", {"wandb": Notes})
    monkeypatch.setattr(Notes, "told", found := [], raising=False)
    return found


def test_a_logger_is_told_what_the_lines_say(told: list[tuple[Any, ...]], tmp_path: Path) -> None:
    result = fit(tmp_path / "run", logger="wandb")
    assert told[0] == ("open", "run", 3, None)
    assert told[-1] == ("close", "done")
    written = [(group, step, values) for group, step, *more in told[1:-1] for values in more]
    lines = [line for line in lines_of(tmp_path / "run") if line["action"] == "learn"]
    assert [group for group, _, _ in written[: len(lines)]] == [f"partition {line['partition'] + 1}" for line in lines]
    last = 0
    for line, (_, step, values) in zip(lines, written, strict=False):
        last = line["step"] if "step" in line else {3: 7, 6: 7, 12: 14}[last]  # the epoch's last step
        assert step == last
        assert values == {name: line[name] for name in values}
        assert set(values) >= ({"loss", "lr"} if "step" in line else {"train_loss", "val_loss", "epoch"})
    finals = {group: values for group, _, values in written[len(lines) :]}
    assert finals["test"]["accuracy"] == result.test_accuracy
    assert finals["run"]["peak_bytes"] == result.peak_bytes


def test_a_resume_logs_to_the_same_run(told: list[tuple[Any, ...]], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(tmp_path / "run", logger="wandb", callbacks=[StopsAt(11)])
    assert told[-1] == ("close", "stopped")
    told.clear()
    fit(tmp_path / "run", resume=True, method="pnn")
    assert (told[0], told[-1]) == (("open", "run", 3, "an id"), ("close", "done"))
    told.clear()
    fit(tmp_path / "run", overwrite=True, epochs=1, method="exact", logger="wandb")
    assert told[0] == ("open", "run", 3, None), "another run"
    assert {group for group, *_ in told} == {"open", "model", "val", "test", "run", "close"}


def test_a_service_that_fails_loses_the_log_alone(
    told: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Notes, "fails", True)
    display = Tells()
    result = fit(tmp_path / "run", logger="wandb", display=display)
    assert result.test_accuracy is not None
    failed = [text for text in display.told if "--logger" in text]
    assert failed == ["--logger wandb failed, and logs no more: ConnectionError: nobody there; metrics.jsonl has all of it"]

    def refuse(self: Notes, *_: object) -> tuple[str, str]:
        raise PermissionError("no key")

    monkeypatch.setattr(Notes, "open", refuse)
    with pytest.raises(ConfigError, match="--logger wandb cannot begin to log: PermissionError: no key; or give --logger none"):
        fit(tmp_path / "other", logger="wandb")
    assert fit(tmp_path / "other", resume=True, logger="none").test_accuracy is not None


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"--logger {name} needs {name}, .*; run: pip install 'lowmem-pnn\[{name}\]'$"):
        fit(tmp_path / "run", logger=name)
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_its_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    display = Tells()
    result = fit(tmp_path / "run", logger="tensorboard", display=display)
    folder = tmp_path / "run" / "tensorboard"
    assert f"tensorboard --logdir {folder}" in display.told
    events = EventAccumulator(str(folder))
    events.Reload()
    lines = [line for line in lines_of(tmp_path / "run") if line["action"] == "learn" and line["partition"] == 1]
    for name in ("loss", "val_loss"):
        scalars = events.Scalars(f"partition 2/{name}")
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in lines if name in line])
    assert [scalar.step for scalar in events.Scalars("partition 2/val_loss")] == [7, 14]
    assert events.Scalars("test/accuracy")[0].value == pytest.approx(result.test_accuracy)
    fit(tmp_path / "run", overwrite=True, epochs=1)
    assert not folder.exists(), "an overwritten run leaves no curves"


def test_wandb_logs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    display = Tells()
    with pytest.raises(Stopped):
        fit(tmp_path / "run", logger="wandb", callbacks=[StopsAt(11)], display=display)
    known = json.loads((tmp_path / "run" / "logger.json").read_text())["wandb"]
    fit(tmp_path / "run", resume=True, display=display)
    places = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert [place.name.rpartition("-")[2] for place in places] == [known] * 2
    assert [text for text in display.told if text.startswith("wandb: wandb sync ")] == [f"wandb: wandb sync {p}" for p in places]
    assert all(next(place.glob("*.wandb")).stat().st_size > 0 for place in places)
    assert wandb.run is None


def test_mlflow_has_parameters_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    with pytest.raises(Stopped):
        fit(tmp_path / "run", logger="mlflow", callbacks=[StopsAt(11)])
    known = json.loads((tmp_path / "run" / "logger.json").read_text())["mlflow"]
    client = mlflow.MlflowClient()
    assert client.get_run(known).info.status == "KILLED"
    result = fit(tmp_path / "run", resume=True)
    run = client.get_run(known)
    assert (run.info.status, run.info.run_name, run.data.params["log_every"]) == ("FINISHED", "run", "3")
    assert run.data.metrics["test/accuracy"] == result.test_accuracy
    assert [metric.step for metric in client.get_metric_history(known, "partition 1/val_loss")] == [7, 14]
    assert mlflow.active_run() is None

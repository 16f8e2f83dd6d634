"""Whole runs on tables: trained, scored, evaluated and resumed with the statistics of their training part."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers.commands import lowmem_pnn as command
from helpers.plainloops import assert_same_weights, loaded

FIT = "fit --max-gpu-mem 100MB --device cpu --epochs 1 --method exact --data csv:a.csv --target y --model"


def write(folder: Path, values: str = "rated") -> None:
    random = np.random.RandomState(0)
    rows = [(random.rand() * 50, "uvw"[random.randint(3)]) for _ in range(60)]
    target = {"rated": lambda a, k: f"{a / 7 + len(k):.3f}", "named": lambda a, k: "high" if a > 25 else "low"}[values]
    (folder / "a.csv").write_text("a;k;y\n" + "".join(f"{a:.3f};{k};{target(a, k)}\n" for a, k in rows))


def test_regression_on_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    done = command(f"{FIT} mlp:4-8-1 --workdir run")
    assert done.code == 0, done.err
    assert "data: 49 to train on, 5 to validate on (0.1 of the training data, by seed), 6 to test on (0.1 of" in done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["preparation"]["columns"] == {"a": None, "k": ["u", "v", "w"]}
    assert (len(result["preparation"]["mean"]), result["preparation"]["std"][1:]) == (4, [1, 1, 1])
    assert lowmem_pnn.evaluate(tmp_path / "run")["test_loss"] == result["test_loss"]
    again = command("fit --resume --workdir run --target y --data csv:a.csv")
    assert again.code == 0, again.err
    (tmp_path / "a.csv").write_text((tmp_path / "a.csv").read_text().replace(";u;", ";v;", 1))
    changed = (
        r"^the data csv:.*a\.csv is not what the run in .*run began with \(as many samples, train=49 val=5 test=6, but others\)"
    )
    with pytest.raises(lowmem_pnn.errors.CheckpointError, match=changed):
        lowmem_pnn.evaluate(tmp_path / "run")


def test_words_are_classes_and_arrays_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "named")

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    options = {"method": "exact", "max_gpu_mem": "100MB", "device": "cpu", "epochs": 1, "val_fraction": 0}
    result = lowmem_pnn.fit(build, "csv:a.csv", target="y", normalize="none", test_fraction=0, workdir="table", **options)
    rows = [line.split(";") for line in (tmp_path / "a.csv").read_text().splitlines()[1:]]
    x = torch.tensor([[float(a), *(float(word == k) for word in "uvw")] for a, k, _ in rows])
    y = torch.tensor([["high", "low"].index(word) for _, _, word in rows])
    plain = lowmem_pnn.fit(build, (x, y), workdir="arrays", **options)
    assert_same_weights(loaded(build, result.weights_file), loaded(build, plain.weights_file))
    assert result.preparation["classes"] == ["high", "low"]


def test_data_frames_train_and_are_predicted_as_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    frame = pd.read_csv("a.csv", sep=";")

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    options = {"method": "exact", "max_gpu_mem": "100MB", "device": "cpu", "epochs": 1, "target": "y", "compare": False}
    one, other = (
        lowmem_pnn.fit(build, data, workdir=name, **options) for data, name in (("csv:a.csv", "file"), (frame, "frame"))
    )
    assert_same_weights(loaded(build, one.weights_file), loaded(build, other.weights_file))
    assert one.scores == other.scores
    (tmp_path / "a.csv").rename("b.csv")  # the run's own data would be its test part alone
    without = frame.drop(columns="y")
    answers = [
        lowmem_pnn.predict(*given) for given in ((one, "b.csv"), (other, frame), (other, without), (one, (without, frame.y)))
    ]
    assert all(np.array_equal(answer["outputs"], answers[0]["outputs"]) for answer in answers)
    with pytest.raises(lowmem_pnn.errors.ConfigError, match="has no column 'k'"):
        lowmem_pnn.predict(other, frame[["a", "y"]])

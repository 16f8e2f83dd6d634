"""Evaluation of finished runs that were started from Python, and on other data than the run's own."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem_pnn
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.inference import load as known_models

RANDOM = torch.Generator().manual_seed(0)
X = torch.rand(40, 6, generator=RANDOM)
Y = (3 * X[:, 0]).long()
RUN: dict[str, Any] = {
    "max_gpu_mem": "60MB",
    "device": "cpu",
    "epochs": 1,
    "compare": False,
    "method": "exact",
    "val_fraction": 0,
}


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def as_evaluated(scores: dict[str, Any]) -> dict[str, Any]:
    return {f"test_{name}": value for name, value in scores.items()}


def test_model_and_data_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = lowmem_pnn.fit(build, (X, Y), test=(X[:16], Y[:16]), workdir=tmp_path / "run", **RUN)
    expected = as_evaluated(result.scores["test"])
    with pytest.raises(
        ConfigError, match=r"was trained on data from Python \(python:tuple\), which no name leads to; give data with targets"
    ):
        lowmem_pnn.evaluate(result)
    assert lowmem_pnn.evaluate(result, (X[:16], Y[:16])) == expected
    with pytest.raises(
        DataError, match=r"^16 samples of python:Tensor, have no targets to evaluate .* on; give samples and targets"
    ):
        lowmem_pnn.evaluate(result, X[:16])
    with pytest.raises(DataError, match="has samples of shape"):
        lowmem_pnn.evaluate(result, (X[:16, :5], Y[:16]))
    monkeypatch.setattr(known_models, "_GIVEN", {})  # as in another process
    with pytest.raises(
        ConfigError, match=r"started from Python with its own model \(python:build\).*lowmem_pnn.evaluate\(.*, data, model=...\)"
    ):
        lowmem_pnn.evaluate(result, (X[:16], Y[:16]))
    assert lowmem_pnn.evaluate(result, (X[:16], Y[:16]), model=build) == expected


def test_named_data_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame(X.numpy(), columns=list("abcdef")).assign(y=Y.numpy())
    frame.to_csv(tmp_path / "a.csv", index=False)
    result = lowmem_pnn.fit(build, f"csv:{tmp_path / 'a.csv'}", target="y", workdir=tmp_path / "run", **RUN)
    monkeypatch.setattr(known_models, "_GIVEN", {})
    with pytest.raises(
        ConfigError, match=r"started from Python with its own model \(python:build\).*lowmem_pnn.evaluate\(.*, model=...\)"
    ):
        lowmem_pnn.evaluate(result)
    assert lowmem_pnn.evaluate(result, model=build) == as_evaluated(result.scores["test"])
    assert lowmem_pnn.evaluate(result, frame, model=build) == lowmem_pnn.evaluate(
        result, (frame.drop(columns="y"), frame.y), model=build
    )


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    def loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(outputs[:, 0], targets["sum"]) + F.cross_entropy(outputs[:, 1:], targets["class"])

    metrics = {"error": lambda outputs, targets: ((outputs[:, 0] - targets["sum"]).abs().sum(), len(outputs))}
    data = X, {"sum": X.sum(1), "class": Y.clamp(max=1)}
    result = lowmem_pnn.fit(build, data, test=data, loss=loss, metrics=metrics, workdir=tmp_path / "run", **RUN)
    with pytest.raises(ConfigError, match=r"with its own loss \(python:loss\), .* lowmem_pnn.evaluate\(.*, loss=...\)$"):
        lowmem_pnn.evaluate(result, data)
    assert lowmem_pnn.evaluate(result, data, loss=loss, metrics=metrics) == as_evaluated(result.scores["test"])


def test_a_few_targets_are_what_those_of_the_run_are(tmp_path: Path) -> None:
    result = lowmem_pnn.fit(lambda: nn.Linear(6, 1), (X, X.sum(1)), workdir=tmp_path / "run", **RUN)
    with torch.no_grad():
        answers = lowmem_pnn.load(result)(X[:2])[:, 0]
    for y in ([3, 5], [0.0, 2000.0]):
        scores = lowmem_pnn.evaluate(result, (X[:2], y))
        assert scores["test_loss"] == pytest.approx(float(F.mse_loss(answers, torch.tensor(y).float())), rel=1e-5)
    assert lowmem_pnn.predict(result, (X[:2], [3.0, 5.0]))["targets"].tolist() == [3.0, 5.0]

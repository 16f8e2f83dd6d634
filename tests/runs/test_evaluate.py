"""Evaluation of finished runs that were started from Python, and on other data than the run's own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem_pnn
from helpers.commands import lowmem_pnn as command
from helpers.commands import write_data
from helpers.displays import StopsAt, Told
from helpers.simulated import train_on
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.errors import BudgetError, ConfigError, DataError, Stopped
from lowmem_pnn.inference import load as known_models
from lowmem_pnn.planning.request import PlanRequest

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


class Drawn(nn.Module):
    """Keeps what its constructor draws, of torch and of numpy, beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.features, self.order = nn.Linear(8, 3), torch.randn(6, 8), np.random.permutation(8).tolist()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(torch.sin(x @ self.features)[:, self.order])
        return scores


def test_what_a_constructor_draws_is_the_same_in_a_resume_and_for_whoever_reads_the_run(tmp_path: Path) -> None:
    def fit(state: int, folder: str, **options: Any) -> Any:
        torch.manual_seed(state)
        np.random.seed(state)
        own = {**RUN, "compare": True, "commit_every": 0, "batch_size": 10}
        return lowmem_pnn.fit(Drawn, (X, Y), test=(X, Y), workdir=tmp_path / folder, **own, **options)

    expected = fit(1, "whole")
    with pytest.raises(Stopped):
        fit(2, "run", display=StopsAt(4))
    result = fit(3, "run", resume=True)
    assert result.resumed == 1
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    model = lowmem_pnn.load(result)
    assert torch.equal(model.last.weight, lowmem_pnn.load(expected).last.weight)
    assert as_evaluated(result.scores["test"]) == lowmem_pnn.evaluate(result, (X, Y)) == as_evaluated(expected.scores["test"])
    with torch.no_grad():
        assert F.cross_entropy(model(X), Y) == pytest.approx(result.test_loss, abs=1e-6)
    assert (torch.get_rng_state().equal(before[0]), np.random.get_state()[1].tolist()) == (True, before[1])


def test_model_and_data_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame(X.numpy(), columns=list("abcdef"))
    options = {**RUN, "class_weights": "balanced"}
    result = lowmem_pnn.fit(build, (frame, Y), test=(frame[:16], Y[:16]), workdir=tmp_path / "run", **options)
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
    message = r"^data python:\w+: column 1 is 'b', and 'a' in the training data; give its columns, in the same order$"
    for other in ((frame[list("bacdef")], Y), frame[list("bacdef")]):
        with pytest.raises(DataError, match=message):
            (lowmem_pnn.evaluate if isinstance(other, tuple) else lowmem_pnn.predict)(result, other)
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
    broken = frame.assign(y=frame.y.astype(object).where(frame.index > 0))
    with pytest.raises(DataError, match=r"leave (them|the row) out \(--skip-broken\)$"):
        lowmem_pnn.evaluate(result, broken, model=build)
    found = lowmem_pnn.evaluate(result, broken, model=build, skip_broken=True, display=(said := Told()))
    assert found == lowmem_pnn.evaluate(result, frame[1:], model=build)
    assert said.messages[0] == "data: 39 samples of python:DataFrame"


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    def loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(outputs[:, 0], targets["sum"]) + F.cross_entropy(outputs[:, 1:], targets["class"])

    metrics = {"error": lambda outputs, targets: ((outputs[:, 0] - targets["sum"]).abs().sum(), len(outputs))}
    data = X, {"sum": X.sum(1), "class": Y.clamp(max=1)}
    result = lowmem_pnn.fit(build, data, test=data, loss=loss, metrics=metrics, workdir=tmp_path / "run", **RUN)
    with pytest.raises(ConfigError, match=r"with its own loss \(python:loss\), .* lowmem_pnn.evaluate\(.*, loss=...\)$"):
        lowmem_pnn.evaluate(result, data)
    assert lowmem_pnn.evaluate(result, data, loss=loss, metrics=metrics) == as_evaluated(result.scores["test"])
    none: Any = lambda outputs, targets: loss(outputs, targets) * torch.nan  # noqa: E731
    left = {name: value for name, value in result.scores["test"].items() if name != "loss"}
    assert lowmem_pnn.evaluate(result, data, loss=none, metrics=metrics, display=(said := Told())) == as_evaluated(left)
    assert said.messages[-1] == "test loss is nan, and left out of the result"


def test_metrics_are_refused_where_outputs_are_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a plan has them where they are large.
    monkeypatch.setattr(PlanRequest, "loss_chunk", 4)
    run = {**RUN, "workdir": tmp_path / "run", "commit_every": 0, "batch_size": 20}
    with pytest.raises(Stopped):
        lowmem_pnn.fit(build, (X, Y), display=StopsAt(2), **run)
    given = {"metrics": {"mean": lambda outputs, targets: (outputs.mean(), 1)}}
    text = r"^metrics of your own take whole outputs, and the run's plan has 4 rows at a time; take them of what lowmem_pnn.predict\("
    with pytest.raises(ConfigError, match=text):
        lowmem_pnn.fit(build, (X, Y), resume=True, **given, **run)
    result = lowmem_pnn.fit(build, (X, Y), resume=True, **run)
    with pytest.raises(ConfigError, match=text):
        lowmem_pnn.evaluate(result, (X, Y), **given)


# On another machine.


def test_a_run_of_a_gpu_is_used_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    data, run = f"npz:{write_data(tmp_path / 'data.npz')}", tmp_path / "run"
    options = {**RUN, "device": "cuda", "tf32": True, "budget_scope": "allocator", "max_host_mem": "1GB"}
    with monkeypatch.context() as patch:
        train_on(SimulatedDevice(60_000_000), patch)
        result = lowmem_pnn.fit("mlp:20-64-64-3", data, workdir=run, **options)
    with pytest.raises(ConfigError, match=r"^--device cuda:0: found 0 CUDA devices here; give --device cpu$"):
        lowmem_pnn.evaluate(run)
    assert lowmem_pnn.evaluate(run, device="cpu")["test_accuracy"] == result.scores["test"]["accuracy"]
    assert len(lowmem_pnn.predict(run, device="auto")["scores"]) == 30
    done = command("evaluate", run, "--device", "cpu", "--max-gpu-mem", "10MB", "--json")
    assert (done.code, "test_accuracy" in done.out) == (0, True), done.err


def test_a_budget_above_this_machines_memory_may_be_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.default_rng(0).random((40, 64), dtype=np.float32), np.arange(40) % 3
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    run = {**RUN, "kappa": (1.0, 2.0), "method": "pnn", "partitions": 3}
    result = lowmem_pnn.fit("mlp:64-512-512-512-3", f"npz:{tmp_path / 'data.npz'}", workdir=tmp_path / "run", **run)
    expected = lowmem_pnn.evaluate(result)
    assert lowmem_pnn.evaluate(result, max_gpu_mem="3.6MB") == expected == as_evaluated(result.scores["test"])
    memory = SimpleNamespace(total=40_000_000, available=40_000_000)
    monkeypatch.setattr("lowmem_pnn.training.setup.psutil.virtual_memory", lambda: memory)
    with pytest.raises(BudgetError, match=r"--max-gpu-mem 60\.0 MB is more than this machine has, 40\.0 MB; give less"):
        lowmem_pnn.evaluate(result)
    assert lowmem_pnn.evaluate(result, max_gpu_mem="30MB") == expected


def test_a_few_targets_are_what_those_of_the_run_are(tmp_path: Path) -> None:
    result = lowmem_pnn.fit(lambda: nn.Linear(6, 1), (X, X.sum(1)), workdir=tmp_path / "run", **RUN)
    with torch.no_grad():
        answers = lowmem_pnn.load(result)(X[:2])[:, 0]
    for y in ([3, 5], [0.0, 2000.0]):
        scores = lowmem_pnn.evaluate(result, (X[:2], y))
        assert scores["test_loss"] == pytest.approx(float(F.mse_loss(answers, torch.tensor(y).float())), rel=1e-5)
    assert lowmem_pnn.predict(result, (X[:2], [3.0, 5.0]))["targets"].tolist() == [3.0, 5.0]

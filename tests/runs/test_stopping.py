"""The end of training: early stopping, the best weights, a time limit; and callbacks that look on."""

import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers.plainloops import assert_same_weights, loaded
from lowmem_pnn.errors import CheckpointError, ConfigError, Stopped

RANDOM = np.random.default_rng(3)
X = RANDOM.normal(size=(60, 5)).astype(np.float32)
# Noise: the validation loss soon rises.
Y = RANDOM.integers(0, 3, 60)
OPTIONS: dict[str, Any] = {"max_gpu_mem": "1GB", "device": "cpu", "batch_size": 8, "lr": 0.05}


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 3))


def fit(folder: Path, **options: Any) -> Any:
    return lowmem_pnn.fit(build, (X, Y), test=(X, Y), workdir=folder, **{**OPTIONS, **options})


def val_losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["val_loss"] for line in lines if "val_loss" in line]


@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_the_best_weights_are_those_of_a_run_that_ends_there(method: str, tmp_path: Path) -> None:
    best = fit(tmp_path / "best", epochs=8, method=method, keep_weights="best")
    losses = val_losses(tmp_path / "best")
    assert best.best_epoch == 1 + losses.index(min(losses)) < 8, "or this test tests nothing"
    there = fit(tmp_path / "there", epochs=best.best_epoch, method=method)
    assert_same_weights(loaded(build, best.weights_file), loaded(build, there.weights_file))
    assert best.scores == there.scores
    assert best.scores["val"]["loss"] == pytest.approx(min(losses), rel=1e-5)
    assert "the weights are those of epoch" in str(best)
    last = fit(tmp_path / "last", epochs=8, method=method)
    assert (last.best_epoch, last.weights_of) == (None, "last")
    assert last.scores["val"]["loss"] > best.scores["val"]["loss"]


@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_patience_ends_training(method: str, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", epochs=12, method=method)
    losses = val_losses(tmp_path / "whole")
    end = next(epoch for epoch in range(12) if epoch - losses.index(min(losses[: epoch + 1])) >= 2) + 1
    assert end < 12, "or this test tests nothing"
    early = fit(tmp_path / "early", epochs=12, method=method, early_stop=2)
    assert (early.stopped_after, early.best_epoch) == (end, end - 2)
    assert val_losses(tmp_path / "early") == losses[:end]
    assert early.macs < whole.macs
    there = fit(tmp_path / "there", epochs=end, method=method)
    assert_same_weights(loaded(build, early.weights_file), loaded(build, there.weights_file))
    assert early.macs == there.macs


@pytest.mark.parametrize(
    ("method", "cut_short"), [("pnn", "epochs"), ("pnn", "recovery_epochs"), ("incubate", "recovery_epochs")]
)
def test_methods_by_partition_are_watched_in_their_last_epochs(method: str, cut_short: str, tmp_path: Path) -> None:
    def trained(name: str, last: int, **more: Any) -> Any:
        epochs: Any = {"epochs": (1, last)} if cut_short == "epochs" else {"epochs": 1, "recovery_epochs": last}
        more |= {"meta_epochs": 1} if method == "incubate" else {"kappa": 1}
        return fit(tmp_path / name, method=method, cuts="1", compare=False, **epochs, **more)

    best = trained("best", 12, early_stop=2, keep_weights="best")
    lines = lines_of(tmp_path / "best", "val_loss")
    losses = [
        line["val_loss"]
        for line in lines
        if line["action"] == ("learn" if cut_short == "epochs" else "sweep") and line["partition"]
    ]
    assert best.best_epoch == 1 + losses.index(min(losses)) == len(losses) - 2 < 10, "or this test tests nothing"
    assert best.stopped_after == len(losses)
    there = trained("there", best.best_epoch)
    assert_same_weights(loaded(build, best.weights_file), loaded(build, there.weights_file))
    assert best.scores == there.scores
    where = "of 12 of the last partition" if cut_short == "epochs" else "of 12 of recovery"
    assert f"ended early, after epoch {len(losses)} {where}; the best was" in str(best)


class StopsAt(lowmem_pnn.Callback):
    """Ends a run after some steps, as a signal would, but without a commit of its own."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, info: Mapping[str, Any]) -> None:
        if info["step"] == self.step:
            raise Stopped("enough")


@pytest.mark.parametrize("step", [7, 15, 20, 33])
def test_the_best_weights_survive_a_run_that_is_cut_off(step: int, tmp_path: Path) -> None:
    options = {"epochs": 8, "method": "exact", "keep_weights": "best", "early_stop": 4, "commit_every": 0.0}
    expected = fit(tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", callbacks=[StopsAt(step)], **options)
    result = lowmem_pnn.fit(build, (X, Y), test=(X, Y), workdir=tmp_path / "cut", max_gpu_mem="1GB", resume=True)
    assert_same_weights(loaded(build, result.weights_file), loaded(build, expected.weights_file))
    assert (result.best_epoch, result.stopped_after, result.scores) == (
        expected.best_epoch,
        expected.stopped_after,
        expected.scores,
    )


class Counts(nn.Module):
    """Goes by how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(5, 64), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scaled: torch.Tensor = self.linear(x) * (1 + 0.01 * self.calls)
        return scaled


def test_attributes_of_modules_are_those_of_the_best_weights(tmp_path: Path) -> None:
    def counting() -> nn.Module:
        return nn.Sequential(Counts(), nn.ReLU(), nn.Linear(64, 3))

    options = {**OPTIONS, "method": "backprop", "compare": False}
    best = lowmem_pnn.fit(counting, (X, Y), workdir=tmp_path / "best", epochs=8, keep_weights="best", **options)
    assert best.best_epoch is not None
    assert best.best_epoch < 8, "or this test tests nothing"
    there = lowmem_pnn.fit(counting, (X, Y), workdir=tmp_path / "there", epochs=best.best_epoch, **options)
    assert best.module_state == there.module_state != {}


def test_a_flip_in_the_best_weights_is_noticed(tmp_path: Path) -> None:
    options = {"epochs": 8, "method": "exact", "keep_weights": "best", "commit_every": 0.0}
    with pytest.raises(Stopped):
        fit(tmp_path / "run", callbacks=[StopsAt(45)], **options)
    best = json.loads((tmp_path / "run" / "journal.json").read_text())["body"]["best"]
    path = tmp_path / "run" / "weights" / best["weights"]["partitions"][0]["file"]
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"has sha256 .*, the journal says"):
        lowmem_pnn.fit(build, (X, Y), test=(X, Y), workdir=tmp_path / "run", max_gpu_mem="1GB", resume=True)


def test_a_time_limit_stops_at_a_commit_and_a_resume_goes_on(tmp_path: Path) -> None:
    expected = fit(tmp_path / "whole", epochs=3, method="exact")
    with pytest.raises(Stopped, match="goes on from the last commit"):
        fit(tmp_path / "run", epochs=3, method="exact", time_limit=1e-6)
    result = lowmem_pnn.fit(build, (X, Y), test=(X, Y), workdir=tmp_path / "run", max_gpu_mem="1GB", resume=True, time_limit="1h")
    assert_same_weights(loaded(build, result.weights_file), loaded(build, expected.weights_file))


class Notes(lowmem_pnn.Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Mapping[str, Any]]] = []

    def on_fit_start(self, info: Mapping[str, Any]) -> None:
        self.told.append(("start", info))

    def on_step_end(self, info: Mapping[str, Any]) -> None:
        self.told.append(("step", info))

    def on_epoch_end(self, info: Mapping[str, Any]) -> None:
        self.told.append(("epoch", info))

    def on_commit(self, info: Mapping[str, Any]) -> None:
        self.told.append(("commit", info))

    def on_fit_end(self, info: Mapping[str, Any]) -> None:
        self.told.append(("end", info))


class Predicts(lowmem_pnn.Callback):
    """Predicts by another run after each epoch."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.scores: list[Any] = []

    def on_epoch_end(self, info: Mapping[str, Any]) -> None:
        self.scores.append(lowmem_pnn.predict(self.run, X, model=build)["scores"])


def test_a_callback_may_predict_by_another_run(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", epochs=2)
    predicts = Predicts(plain)
    watched = fit(tmp_path / "watched", epochs=2, callbacks=[predicts])
    expected = lowmem_pnn.predict(plain, X, model=build)["scores"]
    assert [np.array_equal(scores, expected) for scores in predicts.scores] == [True, True]
    assert_same_weights(loaded(build, watched.weights_file), loaded(build, plain.weights_file))
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY, "both limits are lifted"


@pytest.mark.parametrize("method", ["exact", "backprop", "pnn", "neuroflux"])
def test_callbacks_are_told_in_order(method: str, tmp_path: Path) -> None:
    notes = Notes()
    result = fit(tmp_path / "run", epochs=2, method=method, callbacks=[notes], **({} if method == "backprop" else {"cuts": "1"}))
    names = [name for name, _ in notes.told if name != "commit"]
    assert (names[0], names[-1]) == ("start", "end")
    learners = 1 if method in ("exact", "backprop") else 2
    assert names[1:-1] == (["step"] * 7 + ["epoch"]) * 2 * learners
    steps = [info["step"] for name, info in notes.told if name == "step"]
    assert steps == [*range(1, 15)] * learners
    assert notes.told[-1][1]["test_accuracy"] == result.test_accuracy
    commits = [info["number"] for name, info in notes.told if name == "commit"]
    assert commits == sorted(set(commits))
    assert len(commits) >= 2


@pytest.mark.parametrize(("options", "text"), [
    ({"method": "neuroflux", "early_stop": 2}, "--early-stop has no effect here: it needs --method pnn, exact or backprop, or incubate"),
    ({"method": "incubate", "keep_weights": "best"}, "--keep-weights has no effect here: it needs --method pnn, exact or backprop, or incubate"),
    ({"method": "pnn", "early_stop": 2, "parallel_sil": True}, "--parallel-sil joins it later; give --recovery-epochs, or leave one out"),
    ({"method": "exact", "monitor": "val_accuracy"}, "--monitor has no effect here: it needs --early-stop or --keep-weights best"),
    ({"method": "exact", "early_stop": 2, "val_fraction": 0.0}, "go by the validation part, and data .* has none; give --val-fraction"),
    ({"method": "exact", "early_stop": 2, "recovery_epochs": 1}, "--early-stop and --keep-weights best watch the epochs"),
    ({"method": "exact", "time_limit": "90"}, "--time-limit: '90' is not a time; write 90m, 1h30m or 45s"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        fit(tmp_path / "run", epochs=2, **options)


def test_numbers_have_no_accuracy_to_watch(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--monitor val_accuracy is no score of regression on the validation part, which has val_loss, val_mse"
    ):
        lowmem_pnn.fit(
            lambda: nn.Linear(5, 1), (X, torch.from_numpy(X[:, 0])), workdir=tmp_path / "run", method="exact", early_stop=1,
            monitor="val_accuracy", **OPTIONS,
        )  # fmt: skip


# Scores other than the loss, and validations within epochs.


def lines_of(folder: Path, key: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in line]


LABELS = np.stack([Y == 0, X[:, 0] > 0], 1).astype(np.float32)
VALUES = np.stack([X[:, 0] + 0.3, X[:, 1] * 2], 1)
MASKS = (RANDOM.normal(size=(40, 3, 6, 6)).astype(np.float32), RANDOM.integers(0, 3, (40, 6, 6)))


@pytest.mark.parametrize(
    ("name", "targets", "outputs", "most"),
    [
        ("f1", Y, 3, True), ("top5", Y, 7, True), ("accuracy", Y, 3, True), ("f1", LABELS, 2, True),
        ("average_precision", LABELS, 2, True), ("mse", VALUES, 2, False), ("mae", VALUES, 2, False), ("r2", VALUES, 2, True),
    ],
)  # fmt: skip
def test_the_best_is_best_by_any_score_of_the_validation_part(
    name: str, targets: Any, outputs: int, most: bool, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, outputs))

    options = {"method": "backprop" if name == "mae" else "exact", "epochs": 5, "keep_weights": "best", "monitor": f"val_{name}"}
    result = lowmem_pnn.fit(build, (X, targets), workdir=tmp_path, compare=False, **{**OPTIONS, **options})
    values = [line[f"val_{name}"] for line in lines_of(tmp_path, "train_loss")]
    assert len(values) == 5
    assert result.best_epoch == 1 + values.index(max(values) if most else min(values))
    assert result.scores["val"][name] == pytest.approx(values[result.best_epoch - 1], rel=1e-5)


def test_masks_and_metrics_of_ones_own_are_monitored(tmp_path: Path) -> None:
    masks = lowmem_pnn.fit(
        lambda: nn.Conv2d(3, 3, 1),
        MASKS,
        workdir=tmp_path / "masks",
        **OPTIONS,
        method="exact",
        epochs=2,
        early_stop=1,
        monitor="val_miou",
    )
    assert masks.scores["val"]["miou"] >= 0
    own: dict[str, Any] = {
        "loss": nn.functional.cross_entropy,
        "metrics": {"wrong": lambda outputs, targets: ((outputs.argmax(1) != targets).sum(), len(targets))},
    }
    result = fit(tmp_path / "own", method="exact", epochs=4, keep_weights="best", monitor="min:val_wrong", **own)
    values = [line["val_wrong"] for line in lines_of(tmp_path / "own", "train_loss")]
    assert result.best_epoch == 1 + values.index(min(values))


@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_validations_within_epochs_are_those_of_runs_that_end_there(method: str, tmp_path: Path) -> None:
    # 54 samples make 7 steps of 8 an epoch.
    every = fit(tmp_path / "every", method=method, epochs=3, eval_every=3, compare=False)
    whole = fit(tmp_path / "whole", method=method, epochs=3, compare=False)
    assert_same_weights(loaded(build, every.weights_file), loaded(build, whole.weights_file))
    assert val_losses(tmp_path / "whole") == [line["val_loss"] for line in lines_of(tmp_path / "every", "train_loss")]
    within = [line for line in lines_of(tmp_path / "every", "val_loss") if line["action"] == "validate"]
    assert [(line["step"], line["epoch"]) for line in within] == [(3, 1), (6, 1), (9, 2), (12, 2), (15, 3), (18, 3)]
    best = fit(tmp_path / "best", method=method, epochs=3, eval_every=3, keep_weights="best", compare=False)
    values = {step: line["val_loss"] for line in lines_of(tmp_path / "best", "val_loss") if (step := _step_of(line))}
    assert best.best_step == min(values, key=values.__getitem__) < 21, "or this test tests nothing"
    assert best.best_epoch == (best.best_step // 7 if best.best_step % 7 == 0 else None)
    assert best.scores["val"]["loss"] == pytest.approx(values[best.best_step], rel=1e-5)


def _step_of(line: dict[str, Any]) -> int:
    return line["step"] if "step" in line else 7 * line["epoch"]


@pytest.mark.parametrize("step", [4, 5])
def test_patience_counts_validations_within_epochs_and_survives_a_run_that_is_cut_off(step: int, tmp_path: Path) -> None:
    options = {"method": "exact", "epochs": 8, "eval_every": 2, "early_stop": 3, "keep_weights": "best", "compare": False}
    expected = fit(tmp_path / "whole", **options)
    values = [line["val_loss"] for line in lines_of(tmp_path / "whole", "val_loss")]
    assert len(values) - 1 - values.index(min(values)) == 3
    assert expected.stopped_step is not None
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", callbacks=[StopsAt(step)], commit_every=0.0, **options)
    result = lowmem_pnn.fit(build, (X, Y), test=(X, Y), workdir=tmp_path / "cut", max_gpu_mem="1GB", resume=True)
    assert_same_weights(loaded(build, result.weights_file), loaded(build, expected.weights_file))
    assert [line["val_loss"] for line in lines_of(tmp_path / "cut", "val_loss")] == values
    facts = ("best_epoch", "best_step", "stopped_after", "stopped_step", "macs", "train_loss", "scores")
    assert [getattr(result, name) for name in facts] == [getattr(expected, name) for name in facts]
    assert f"the best was step {result.best_step}" in str(result) or f"the best was epoch {result.best_epoch}" in str(result)


def test_pnn_is_measured_within_the_epochs_of_its_last_partition(tmp_path: Path) -> None:
    fit(tmp_path, method="pnn", cuts="1", epochs=2, eval_every=4, kappa=1, compare=False)
    within = [line for line in lines_of(tmp_path, "val_loss") if line["action"] == "validate"]
    assert [(line["partition"], line["step"]) for line in within] == [(1, 4), (1, 8), (1, 12)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"monitor": "val_f2", "early_stop": 1},
            "--monitor val_f2 is no score of classification on the validation part, which has val_loss, val_accuracy, val_f1; did you mean "
            "'val_f1'?",
        ),
        (
            {"monitor": "accuracy", "early_stop": 1},
            "--monitor accuracy is no score of classification on the validation part, which has val_loss, val_accuracy, val_f1; did you mean "
            "'val_accuracy'?",
        ),
        ({"monitor": "mix:val_f1", "early_stop": 1}, "--monitor mix:val_f1: 'mix' is none of min, max; did you mean 'min'?"),
        ({"monitor": "min:val_f1", "early_stop": 1}, "--monitor min:val_f1: of val_f1 the max is best; give val_f1"),
        (
            {"monitor": "val_own", "early_stop": 1, "loss": nn.functional.cross_entropy, "metrics": {"own": lambda o, t: (o.sum(), 1)}},
            "--monitor val_own: is more of it better, or less? Give max:val_own or min:val_own",
        ),
        ({"monitor": "val_f1"}, "--monitor has no effect here: it needs --early-stop or --keep-weights best"),
        ({"eval_every": 0}, "--eval-every 0: must be greater than 0"),
        ({"eval_every": 5, "method": "neuroflux"}, "--eval-every has no effect here: it needs --method pnn, exact or backprop"),
        (
            {"eval_every": 5, "method": "pnn", "parallel_sil": True},
            "--eval-every measures the model while its last partition learns, and --parallel-sil joins it later; leave one out",
        ),
        (
            {"eval_every": 5, "val_fraction": 0},
            "--eval-every measures the validation part, and data python-tuple has none; give --val-fraction",
        ),
        (
            {"eval_every": 70},
            "--eval-every 70: training has 70 steps of 8 samples, and is measured at its end anyway; give fewer",
        ),
    ],
)  # fmt: skip
def test_refused_in_one_line(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        fit(tmp_path, **{"method": "exact", **options})
    assert str(error.value) == text

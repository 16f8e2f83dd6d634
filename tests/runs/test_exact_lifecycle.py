"""The life of an exact run: interrupted and resumed, out of memory, evaluated, and what ends it."""

import functools
import itertools
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import lowmem_pnn
from helpers.displays import StopsAt
from helpers.exact_runs import COMMON, KINDS, fit
from helpers.plainloops import assert_same_weights, loaded, step_lines, train_by_exact
from helpers.simulated import Squeeze, train_on
from helpers.small_networks import (
    Forgets,
    images,
    small_conv,
    small_gpt,
    small_mlp,
    vectors,
)
from lowmem_pnn.config.configure import configure
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.errors import BudgetError, CaptureError, ConfigError, DataError, DivergedError, Stopped
from lowmem_pnn.inference import evaluate
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.process import Process
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.training import start


def test_too_few_samples_for_the_modules_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match="1 training samples make no batch that all partitions can learn from: the modules need at least 2 samples at once",
    ):
        fit(
            KINDS["conv"].build,
            KINDS["conv"].data,
            tmp_path / "run",
            **{**COMMON, "train_limit": 1, "val_fraction": 0.0, "cuts": "1"},
        )


@pytest.mark.parametrize(
    ("kind", "options", "stops"),
    [
        ("conv", {"cuts": "1,3"}, (1 / 3, 3 / 4)),
        ("conv", {"cuts": "2", "clip_norm": 0.1}, (3 / 4,)),
        ("gpt", {"cuts": "2,5", "lr_schedule": "onecycle"}, (1 / 3,)),
    ],
    ids=["conv", "clipped", "tied"],
)
def test_a_run_that_was_interrupted_and_resumed_is_same_as_uninterrupted(
    kind: str, options: dict[str, Any], stops: tuple[float, ...], tmp_path: Path
) -> None:
    build = functools.partial(small_gpt, tied=True) if kind == "gpt" else KINDS[kind].build
    options = {**COMMON, **options, "micro_batch": 10 if kind == "gpt" else 5, "commit_every": 0.0, "log_every": 1}
    display = StopsAt()
    expected = fit(build, KINDS[kind].data, tmp_path / "whole", display=display, **options)
    assert display.count >= 6
    for at in (int(share * display.count) for share in stops):
        folder = tmp_path / f"run{at}"
        with pytest.raises(Stopped):
            fit(build, KINDS[kind].data, folder, display=StopsAt(at), **options)
        result = fit(build, KINDS[kind].data, folder, resume=True, **options)
        assert result.resumed == 1
        assert_same_weights(loaded(build, result.weights_file), loaded(build, expected.weights_file))
        assert (result.train_loss, result.val_loss) == (expected.train_loss, expected.val_loss)
        assert [line["step"] for line in step_lines(folder)] == [line["step"] for line in step_lines(tmp_path / "whole")]


NAMED: dict[str, Any] = {
    "max_gpu_mem": "400MB", "device": "cpu", "model": "mlp:64-20-16-10", "data": "digits", "train_limit": 60, "test_limit": 50,
    "method": "exact", "cuts": "1,2", "epochs": 3, "batch_size": 16, "lr": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return start.begin(configure(**NAMED), tmp_path_factory.mktemp("named") / "run")


def test_a_run_that_is_asked_to_stop_commits_and_goes_on_from_there(finished: Result, tmp_path: Path) -> None:
    asked = itertools.count()
    with pytest.raises(Stopped, match="--resume"):
        start.begin(configure(**NAMED), tmp_path / "run", process=Process(should_stop=lambda: next(asked) >= 5))
    result = start.resume(tmp_path / "run")
    assert result.resumed == 1
    assert Path(result.weights_file).read_bytes() == Path(finished.weights_file).read_bytes()
    assert (result.train_loss, result.test_loss) == (finished.train_loss, finished.test_loss)


def test_a_finished_run_is_evaluated_to_its_own_scores(finished: Result) -> None:
    assert lowmem_pnn.evaluate(finished.workdir) == {f"test_{name}": value for name, value in finished.scores["test"].items()}


def test_an_evaluation_that_memory_runs_out_in_is_one_line(finished: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(evaluate, "build_weights", full)
    with pytest.raises(BudgetError, match=r"^memory ran out outside of a batch: no room; give a larger --max-gpu-mem$"):
        lowmem_pnn.evaluate(finished.workdir)


def test_a_batch_that_does_not_fit_is_done_again_with_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some partitions of the batch may have been stepped by then; all of them are to go back.
    options = {**COMMON, "batch_size": 12, "cuts": "1,3", "commit_every": 0.0}
    peaks = {}
    for size in (12, 6):
        device = SimulatedDevice(1 << 30)
        train_on(device, monkeypatch)
        peaks[size] = fit(small_conv, images(), tmp_path / str(size), max_gpu_mem=1 << 30, micro_batch=size, **options).peak_bytes
    device = SimulatedDevice(1 << 30)
    # Hardly more than the smaller one needs: the larger peak is that of the check before training.
    display = Squeeze(device, peaks[6] * 21 // 20)
    train_on(device, monkeypatch)
    result = fit(small_conv, images(), tmp_path / "run", max_gpu_mem=1 << 30, display=display, **options)
    assert result.oom_retries == 1
    assert {part["micro_batch"] for part in result.partitions} == {6}
    # 36 samples are 3 batches an epoch.
    expected = train_by_exact(small_conv, images(), micro_batch_of=lambda step: 12 if step < 3 else 6, smallest=2, **options)
    assert_same_weights(loaded(small_conv, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_parameter_without_gradient_is_an_error_that_names_it(clip_norm: float | None, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"parameter 'forgotten\.weight' got no gradient in partition 2 of 3 "):
        fit(Forgets, vectors(), tmp_path / "run", cuts="1,2", clip_norm=clip_norm, epochs=1, loss=Forgets.loss)


@pytest.mark.parametrize("clip_norm", [None, 1e20])
def test_a_loss_that_is_no_number_ends_the_run_at_its_last_commit(clip_norm: float | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **COMMON, "optimizer": "sgd", "momentum": 0.0, "lr": 1e5, "cuts": "1,2", "clip_norm": clip_norm, "commit_every": 0.0,
        "log_every": 1,
    }  # fmt: skip
    with pytest.raises(DivergedError) as first:
        fit(small_mlp, vectors(), tmp_path / "run", **options)
    message = str(first.value)
    found = re.search(r"partition \d of 3 .*step (\d+)", message)
    assert found, message
    assert "last commit is kept" in message
    assert not (tmp_path / "run" / "result.json").exists()
    # Every step before it was committed, and none of them has to be done again to come to the same end.
    step = int(found[1])
    assert step > 1
    display = StopsAt()
    with pytest.raises(DivergedError) as second:
        fit(small_mlp, vectors(), tmp_path / "run", resume=True, display=display, **options)
    assert str(second.value) == message
    assert [line["step"] for line in step_lines(tmp_path / "run")] == list(range(1, step))


def test_batches_too_small_for_the_model_are_an_error(tmp_path: Path) -> None:
    message = (
        r"^--batch-size 1: in train mode the model takes at least 2 samples at once \(BatchNorm over single values needs them\); "
        r"give --batch-size 2 or more$"
    )
    with pytest.raises(ConfigError, match=message):
        fit(small_conv, images(), tmp_path / "run", cuts="2", epochs=1, batch_size=1)


def test_a_commit_seals_no_file_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A second commit right after the first has nothing to seal; by the time that its thread looks, the next batch writes.
    seal, sealed, unfrozen = WeightStore.seal, [], []

    def seal_late(store: WeightStore, partitions: Iterable[Any]) -> dict[str, Any]:
        partitions = list(partitions)
        if threading.current_thread().name.startswith("lowmem-commit"):
            time.sleep(0.02)
            sealed.extend(partitions)
            unfrozen.extend(partition for partition in partitions if partition not in store._frozen)
        return seal(store, partitions)

    monkeypatch.setattr(WeightStore, "seal", seal_late)
    fit(small_mlp, vectors(), tmp_path / "run", **{**COMMON, "commit_every": 0})
    assert sealed
    assert not unfrozen

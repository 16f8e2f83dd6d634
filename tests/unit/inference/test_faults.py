"""Faults of what comes after training: displays are closed, and other threads are refused."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowmem_pnn
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import BusyError, CheckpointError, ConfigError, LowMemError
from lowmem_pnn.inference.evaluate import _own
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.run.only_run import only_run
from lowmem_pnn.tasks import Own
from lowmem_pnn.workload.inputs import named_inputs, with_named_parts


class Noting(Display):
    """Notes that it was closed."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


def predict(**options: Any) -> Any:
    return lowmem_pnn.predict("none", [[1.0]], **options)


def generate(**options: Any) -> Any:
    return lowmem_pnn.generate("none", "Once", **options)


def evaluate(**options: Any) -> Any:
    return lowmem_pnn.evaluate("none", ([[1.0]], [0]), **options)


@pytest.mark.parametrize("call", [predict, generate, evaluate])
def test_a_failure_closes_the_display(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    display = Noting()
    with pytest.raises((CheckpointError, ConfigError)):
        call(display=display)
    assert display.is_closed


def test_samples_of_the_runs_own_data_are_not_left_out_afterwards() -> None:
    with pytest.raises(ConfigError, match=r"^--skip-broken is for data that is given \(--data NAME\): .*; leave it out$"):
        lowmem_pnn.evaluate("none", skip_broken=True)


def fit(**options: Any) -> Any:
    return lowmem_pnn.fit("mlp:64-10", "digits", max_gpu_mem="100MB", device="cpu", workdir="new", **options)


def plan(**options: Any) -> Any:
    return lowmem_pnn.plan("mlp:64-10", "digits", max_gpu_mem="100MB", device="cpu", timing=False, **options)


@pytest.mark.parametrize("call", [predict, generate, fit, plan])
def test_a_run_of_another_thread_is_refused(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[str] = []

    def run() -> None:
        try:
            call()
        except LowMemError as error:
            told.append(f"{type(error).__name__} {error}")

    with only_run(), only_run():  # the same thread may have one inside of another
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert [text.partition(":")[0] for text in told] == [
        f"{BusyError.__name__} another thread of this process trains, or uses, a run, and memory is measured for both together"
    ]
    assert not (tmp_path / "new").exists()
    with only_run():
        pass


def test_parts_that_were_objects_are_no_ones_own_data_later() -> None:
    given = with_named_parts("digits", ([[1.0]], [0]), None, {})
    assert given == {"val_data": "python:tuple"}
    config = configure(max_gpu_mem="100MB", model="mlp:64-10", data="digits", **given)
    with pytest.raises(ConfigError, match=r"was started from Python with its own val_data \(python:tuple\); go on with it there"):
        named_inputs(config)
    with pytest.raises(ConfigError, match=r"^the run was trained on data from Python \(python:tuple\), which no name leads to"):
        _own(config, Path("run"), None, Own())

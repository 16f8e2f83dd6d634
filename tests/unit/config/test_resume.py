"""Resuming with options: those of the run go on, those that change nothing may differ, and others are refused with both values."""

from pathlib import Path
from typing import Any

import pytest

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import began_alike, resumed_config
from lowmem_pnn.errors import ConfigError

RUN = Path("runs/a")


def make(**options: Any) -> FitConfig:
    return configure(**{"max_gpu_mem": "1GB", "model": "mlp:64-32-10", "data": "digits", **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epochs": None},
        {"max_gpu_mem": "1000MB"},
        {"max_gpu_mem": 10**9, "epochs": "3,5", "cuts": "1", "lr": "1e-2"},
        {"cuts": (1,), "lr": 0.01, "val_fraction": "0.1"},
    ],
)
def test_the_options_that_a_run_began_with_resume_it(options: dict[str, Any]) -> None:
    stored = make(epochs="3,5", cuts="1", lr=0.01)
    assert resumed_config(stored, options, RUN) == stored


def test_options_that_change_nothing_in_the_result_are_taken_anew() -> None:
    stored = make(commit_every=5, max_disk="1GB")
    options = {"commit_every": "0", "keep_commits": 3, "log_every": "7", "max_disk": "5GB"}
    config = resumed_config(stored, options, RUN)
    assert (config.commit_every, config.keep_commits, config.log_every, config.max_disk) == (0.0, 3, 7, 5 * 10**9)
    assert began_alike(config, stored)
    # What is left out stays as the run began.
    assert resumed_config(stored, {}, RUN).commit_every == 5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"epochs": 5},
            "began with --epochs 10, and --epochs 5 is given now; leave it out to resume the run, or begin a new one",
        ),
        ({"lr": "0.2"}, "began with --lr 0.001, and --lr 0.2 is given now; leave it out"),
        ({"shuffle": "no"}, "began with --shuffle yes, and --shuffle no is given now; leave it out"),
        ({"cuts": "1"}, "began with --cuts (not given), and --cuts 1 is given now; leave it out"),
        ({"max_gpu_mem": "2GB"}, "began with --max-gpu-mem 1.00GB, and --max-gpu-mem 2.00GB is given now"),
        ({"max_gpu_mem": 10**9 + 1}, "began with --max-gpu-mem 1000000000, and --max-gpu-mem 1000000001 is given now"),
        (
            {"method": "exact", "epochs": "2", "seed": 0},
            "began with --method pnn, --epochs 10, and --method exact, --epochs 2 are given now; leave them out",
        ),
        ({"epoch": 1}, "there is no option --epoch; did you mean 'epochs'?"),
        ({"lr": "fast"}, "--lr 'fast': must be a valid number"),
    ],
)
def test_an_option_that_would_change_the_result_is_refused_with_both_values(options: dict[str, Any], text: str) -> None:
    # In the order of the fields, whatever order they are given in.
    with pytest.raises(ConfigError) as error:
        resumed_config(make(), options, RUN)
    assert text in str(error.value)
    assert text.startswith(("there is", "--")) or str(error.value).startswith("the run in runs/a began with ")


def test_the_demonstration_is_told_from_a_run_with_more_options() -> None:
    assert began_alike(configure(max_gpu_mem="2GB"), configure(max_gpu_mem="2GB", commit_every=1))
    assert not began_alike(configure(max_gpu_mem="2GB"), configure(max_gpu_mem="2GB", epochs=1))


def test_epochs_beyond_the_last_step_are_those_of_a_run_that_an_earlier_version_began() -> None:
    # It stored the epochs up to --max-steps.
    stored, asked = make(method="exact", epochs=1, max_steps=20), make(method="exact", epochs=10, max_steps=20)
    assert resumed_config(stored, {"epochs": 10, "max_steps": 20}, RUN) == stored
    assert began_alike(asked, stored)
    assert not began_alike(stored, asked)
    with pytest.raises(ConfigError, match="--epochs 10: the run began with --max-steps 20; begin a new run"):
        resumed_config(stored, {"epochs": 10, "max_steps": 30}, RUN)

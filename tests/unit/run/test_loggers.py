"""Loggers: at which step a service is told the scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lowmem_pnn.config.configure import configure
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.run import loggers


class Notes(loggers.Service):
    """A service that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def open(self, folder: Path, options: Mapping[str, Any], earlier: str | None) -> tuple[str | None, str]:
        return earlier or "an id", "look here"

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        self.told.append((group, step))

    def close(self, ending: loggers.Ending) -> None:
        pass


@pytest.mark.parametrize("kept", [None, "{}", '{"wandb": "an id", "steps": [1]}'])
def test_a_run_that_was_killed_while_it_was_tested_is_scored_at_its_last_step(
    kept: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "SERVICES", {"wandb": Notes})
    config = configure(max_gpu_mem="100MB", model="mlp:64-32-10", data="digits", logger="wandb")
    start = {"workdir": str(tmp_path), "partitions": 2, "resumed": 0}
    first = loggers.Logger(config, Display())
    first.on_fit_start(start)
    for number, step in ((0, 40), (1, 41)):
        told = {"action": "learn", "partition": number, "epoch": 1}
        first.on_step_end({**told, "step": step, "loss": 0.5, "lr": 0.1, "used_bytes": 1})
        first.on_epoch_end({**told, "train_loss": 0.5})
    if kept is not None:  # as by an earlier version, or by somebody else
        (tmp_path / "logger.json").write_text(kept)
    again = loggers.Logger(config, Display())
    again.on_fit_start({**start, "resumed": 1})
    again.on_fit_end({"scores": {"test": {"loss": 0.5}}, **dict.fromkeys(("seconds", "peak_bytes", "budget_bytes"), 1), **BYTES})
    notes = again._service
    assert isinstance(notes, Notes)
    assert notes.told == [(group, 41 if kept is None else 0) for group in ("test", "run")]
    assert json.loads((tmp_path / "logger.json").read_text())["wandb"] == "an id"


BYTES = {"bytes_read": 1, "bytes_written": 1}

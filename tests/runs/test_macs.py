"""What a run's log says of how much was computed."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.counted_plans import config, plan
from helpers.plainloops import stop_at
from lowmem_pnn.errors import Stopped
from lowmem_pnn.methods import make_method
from lowmem_pnn.methods.macs import program_macs
from lowmem_pnn.run.process import Process
from lowmem_pnn.training import start


def macs_of(folder: Path) -> list[int]:
    return [json.loads(line)["macs"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seen(folder: Path, stop: int | None = None, **options: Any) -> tuple[list[int], int]:
    """The counts in a run's log, and in its result; with `stop` it was stopped at that batch, and resumed."""
    # 90 samples of 100 are trained on: a batch of 40 is followed by another, and by one of 10.
    asked = config(partitions=3, train_limit=100, batch_size=40, log_every=1, **options)
    if stop is None:
        result = start.begin(asked, folder)
    else:
        with pytest.raises(Stopped):
            start.begin(asked, folder, process=Process(should_stop=stop_at(stop)))
        assert macs_of(folder)[-1] < program_macs(make_method(asked).program(3, ["train"]), plan((2048, 512, 160)), 90)
        result = start.resume(folder)
    assert result is not None
    return macs_of(folder), result.macs


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": (2, 1, 2)},
        {"epochs": (1, 2, 1), "parallel_sil": True},
        {"epochs": 1, "recovery_epochs": 2, "recover": (2,), "clip_norm": 1.0},
        {"epochs": 2, "method": "exact", "clip_norm": 1.0},
    ],
    ids=["pnn", "parallel", "recovery", "exact"],
)
def test_every_line_of_the_log_says_how_much_was_computed(options: dict[str, Any], tmp_path: Path) -> None:
    found, total = seen(tmp_path / "run", **options)
    expected = program_macs(make_method(config(**options)).program(3, ["train"]), plan((64 * 32, 32 * 16, 16 * 10)), 90)
    assert found == sorted(found)
    assert 0 < found[0] < found[-1] == total == expected
    assert seen(tmp_path / "stopped", stop=5, commit_every=0.0, **options) == (found, total)


def test_batches_count_the_samples_that_they_have(tmp_path: Path) -> None:
    found, _ = seen(tmp_path / "run", epochs=(2, 1, 1), parallel_sil=True)
    # Three steps and the epoch's own line, each epoch.
    counts = [40, 80, 90, 90, 130, 170, 180, 180]
    assert found[:8] == [2048 * count for count in counts]
    assert found[8:12] == [2048 * 180 + 512 * count for count in (40, 80, 90, 90)]


def test_of_a_pnn_run_lines_are_written_when_outputs_are(tmp_path: Path) -> None:
    found, _ = seen(tmp_path / "run", epochs=1)
    each, other = 2048 * 90, 512 * 90
    # Learning, then outputs of the training and of the validation samples.
    assert found[3:6] == [each, 2 * each, 2 * each]
    assert found[9:12] == [2 * each + other, 2 * each + 2 * other, 2 * each + 2 * other]

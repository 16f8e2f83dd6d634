"""Whatever of a run's files a drive holds after the power went, the run ends with the same bits, or says in one line that it cannot go on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trials.power_loss import RECORDINGS

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_power_lost_anywhere_and_resumed_is_same_as_uninterrupted(
    tmp_path: Path, long: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trials.power_loss", str(tmp_path / "trials"), *(["1000", "0"] if long else ["-8", "0", "pnn"])],
        cwd=TESTS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print("\n" + done.stdout if long else "", end="")
    tallies = json.loads(done.stdout.splitlines()[-1])
    assert tallies
    assert {name: tally["failed"] for name, tally in tallies.items() if tally["failed"]} == {}
    for name, tally in tallies.items():
        assert tally["folders"] >= (500 if long else 8)
        assert tally["resumed"] > 0
        assert tally["resumed"] + tally["begun"] + tally["refused"] == tally["folders"]
        # No commit is ever lost: what can be refused is a run in whose place a new one was about to be.
        assert tally["refused"] == 0 or RECORDINGS[name].overwrites, tally["refusals"]

"""File calls that fail at any place of a command: one clear line and code 5, and afterwards the same bytes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TRIALS = Path(__file__).parents[1] / "trials" / "disk_faults.py"
# Commands of the short form, and how many faults each meets; the long one tries every call x every fault of all commands.
SHORT = ("pnn,evaluate", "3")
ALL = ("pnn,exact,neuroflux,resume,overwrite,evaluate,export,exit,again", "")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc, which builds the library that makes the faults, is not here")
def test_a_file_call_that_fails_is_one_line_and_costs_nothing(long: bool, tmp_path: Path) -> None:
    scenarios, count = ALL if long else SHORT
    arguments = [scenarios, str(tmp_path), *(["all"] if long else ["sample", count, "0"])]
    done = subprocess.run([sys.executable, str(TRIALS), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(json.dumps(found, indent=1))
    assert [one["scenario"] for one in found] == scenarios.split(",")
    for one in found:
        assert not one["failed"], one["failed"]
        assert one["survived"] + one["refused"] > one["trials"] // 2

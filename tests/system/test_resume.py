"""A run that is killed at any moment and resumed ends with the bits of one that was left alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRIALS = Path(__file__).parents[1] / "trials" / "kills.py"


def _trials(method: str, folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(TRIALS), method, str(folder), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert not found["failed"], f"{found['failed']}\n{done.stderr}"
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("method", "which"), [("pnn", "last"), ("exact", "first"), ("recovery", "last")])
def test_kill_at_every_kind_of_commit_point_and_resume_is_same_as_uninterrupted(method: str, which: str, tmp_path: Path) -> None:
    # Both, and every single one, by the script itself: `all`.
    found = _trials(method, tmp_path / "trials", which)
    assert found["killed"] == found["trials"] >= 13


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pnn", "exact"])
def test_kill_at_random_and_resume_is_same_as_uninterrupted(method: str, tmp_path: Path) -> None:
    found = _trials(method, tmp_path / "trials", "random", "8", "0")
    assert found["trials"] == 8
    assert found["killed"] >= 2  # a kill may come late, and find the run done, where the machine was slower at first

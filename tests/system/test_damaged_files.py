"""Damaged files, of a run's and of a user's: noticed or read, and never a crash, a hang, code that runs, or another file changed."""

import json
import subprocess
import sys
from pathlib import Path

TRIALS = Path(__file__).parents[1] / "trials" / "damaged_files.py"


def test_a_damaged_file_is_noticed_by_whoever_reads_it(long: bool, tmp_path: Path) -> None:
    counts = ["99000", "1000"] if long else ["200", "1"]
    arguments = [sys.executable, str(TRIALS), str(tmp_path / "trials"), *counts, "0"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert not found["failed"], found["failed"]
    assert found["noticed"] > found["trials"] // 2
    assert found["read"] > 0, "some of the user's files are read as they are"

"""Random networks and options, watched from outside: no run passes its budget, and what is refused names a budget that works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRIAL = Path(__file__).parents[1] / "trials" / "random_runs.py"
RUNS = 300


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_random_runs_stay_within_their_budgets(long: bool, tmp_path: Path) -> None:
    # In short: a run of each of two methods, both refused at first.
    count, first = (RUNS, 0) if long else (2, 32)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(TRIAL), str(tmp_path), str(count), str(first)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failed"] == []
    assert (found["runs"], found["trained"], found["above"]) == (count, count, 0)
    assert found["refused"] > 0
    assert found["readings"] > 50 * count, "each run was read again and again"

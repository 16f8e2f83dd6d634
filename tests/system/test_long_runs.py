"""Runs of thousands of residencies hold what they held at first; what durability costs is measured by a run without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_pnn.units import MEBIBYTE

TRIALS = Path(__file__).parents[1] / "trials"


def lines_of(script: str, *arguments: object) -> list[dict[str, object]]:
    """Run a trial with one thread; the JSON lines that it prints."""
    command = [sys.executable, str(TRIALS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nothing_grows_with_the_number_of_residencies(long: bool, tmp_path: Path) -> None:
    methods = ["exact", "neuroflux", "pnn"] if long else ["exact", "neuroflux"]
    found = lines_of("residencies.py", ",".join(methods), tmp_path / "run", 2000 if long else 120)
    assert [one["method"] for one in found] == methods
    for one in found:
        early, late = one["early"], one["late"]
        assert isinstance(early, dict)
        assert isinstance(late, dict)
        assert late["threads"] == early["threads"]
        assert late["descriptors"] <= early["descriptors"] + 2
        assert late["memory"] <= early["memory"] + MEBIBYTE
        assert late["disk"] <= early["disk"] * 1.25


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_durability_is_measured_by_a_run_without_it(long: bool, tmp_path: Path) -> None:
    if not long:
        (found,) = lines_of("durability.py", "pnn", tmp_path / "run", 1, "small")
        (durable,), (bare,) = found["durable"], found["bare"]  # type: ignore[misc]
        assert durable["syncs"] > 0
        assert bare["syncs"] == 0
        return
    for method in ("pnn", "exact", "neuroflux"):
        (found,) = lines_of("durability.py", method, tmp_path / "run", 5)
        assert found["more_wall"] <= 0.035, method  # type: ignore[operator]

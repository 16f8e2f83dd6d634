"""The bench of a GPU, tried without one: its whole way, on toys and the simulated device."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


def run(code: str = "", arguments: tuple[str, ...] = ("--dry", "--quick")) -> subprocess.CompletedProcess[str]:
    """The bench in its short form, after some code."""
    script = f"import sys; sys.path.insert(0, {str(BENCH)!r}); sys.argv[1:] = {list(arguments)}\nimport gpu\n{code}\ngpu.main()\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=600)


def test_a_dry_run_holds_and_writes_nothing() -> None:
    before = {file: file.stat().st_mtime_ns for file in (BENCH / "results").iterdir()}
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file: file.stat().st_mtime_ns for file in (BENCH / "results").iterdir()} == before
    assert "A dry run: toys on the CPU, our methods on a simulated device. 7 of 7 cases hold." in done.stdout
    rows = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("|")}
    assert "bit-equal" in rows["exact, as plain PyTorch"]
    assert "partitions" in rows["gpt, exact in 1/4"]


def test_a_case_that_fails_is_said_and_is_the_exit_code() -> None:
    # One case alone, in a process that ends badly; another one, which holds more than its budget.
    done = run(
        "def two(bench, setting):\n"
        "    bench.case('gone', 'nothing')\n"
        "    bench.command('false', [sys.executable, '-c', 'print(7); sys.exit(3)'], 60)\n"
        "    row = gpu.Row('wall', {'peak_mb': 11.0}, 10.0); row.judge(); bench.rows.append(row)\n"
        "gpu.run_all, gpu.PRELOADED = two, []"
    )
    assert done.returncode == 1
    faults = [line.split("|")[-2].strip() for line in done.stdout.splitlines() if "FAILED" in line]
    assert faults[0].startswith("FAILED: KeyError: 'nothing'")
    assert faults[1].startswith("FAILED: exit code 1:")  # no sys in that process
    assert faults[2] == "FAILED: 11 MB held"
    assert "0 of 3 cases hold" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick"])
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    for name in ("PYTHONPATH", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # as it was, afterwards
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH / "gpu.py"), run_name="__main__")
    said = str(ended.value.code)
    assert said.startswith("bench/gpu.py: ")
    assert said.endswith("; --dry tries the bench without a GPU")
    assert not capsys.readouterr().out

"""Commands in processes of their own, on a data set that files beside it make slow, or stuck."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from helpers.commands import write_data
from lowmem_pnn.cli import supervisor

# A data set that files beside it make slow, or stuck, or crash once; and a model that always does.
FACTORIES = """
import os, signal, time
from pathlib import Path
import numpy as np

HERE = Path(__file__).parent

class Set:
    classes = ["a", "b", "c"]
    reads = 0
    def __init__(self):
        with np.load(HERE / "data.npz") as file:
            self.x, self.y = file["x_train"], file["y_train"]
    def __len__(self):
        return len(self.x)
    def __getitem__(self, number):
        if (HERE / "slow").exists():
            time.sleep(float((HERE / "slow").read_text() or 0.002))
        if (HERE / "stuck").exists():
            (HERE / "is stuck").touch()
            time.sleep(60)
        Set.reads += 1
        if Set.reads == 400 and (HERE / "crash").exists():
            (HERE / "crash").unlink()
            os.kill(os.getpid(), signal.SIGSEGV)
        return self.x[number], int(self.y[number])

def data():
    return Set()

def dies():
    os.kill(os.getpid(), signal.SIGSEGV)
"""
SLOW_FIT = (
    "fit --max-gpu-mem 100MB --device cpu --model mlp:20-16-3 --data it.py:data --epochs 3,1 --cuts 1 --batch-size 16 --commit-every 0 "
    "--no-report"
)


def write_slow_data(folder: Path) -> Path:
    """Write the data set, and return the folder."""
    write_data(folder / "data.npz")
    (folder / "it.py").write_text(FACTORIES)
    return folder


class Command:
    """`lowmem-pnn ARGUMENTS` in a process of its own."""

    def __init__(self, folder: Path, arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lowmem_pnn", *arguments.split()],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests may run under nohup, which a run takes for the wish to outlive its terminal.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )

    def end(self) -> tuple[int, str, str]:
        """Wait for it; its exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=240)
        assert "Traceback" not in err, err
        return self.process.returncode, out, err

    def worker(self) -> psutil.Process:
        (worker,) = psutil.Process(self.process.pid).children()
        return worker


def run(folder: Path, arguments: str) -> tuple[int, str, str]:
    return Command(folder, arguments).end()


def wait_for(happens: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def commits(path: Path) -> int:
    return supervisor._commit_number(path) or 0

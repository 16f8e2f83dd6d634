"""The supervisor: stops, kills and crashes of a training, and what comes of the run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from helpers.commands import lowmem_pnn, write_data
from lowmem_pnn.cli import supervisor
from lowmem_pnn.cli.supervisor import supervise

# A data set that files beside it make slow, or stuck, or crash once; and a model that always does.
_FACTORIES = """
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
            time.sleep(0.002)
        if (HERE / "stuck").exists():
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
_FIT = "fit --max-gpu-mem 100MB --device cpu --model mlp:20-16-3 --data it.py:data --epochs 3,1 --cuts 1 --batch-size 16 --commit-every 0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path / "data.npz")
    (tmp_path / "it.py").write_text(_FACTORIES)
    return tmp_path


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
        )

    def end(self) -> tuple[int, str, str]:
        """Wait for it; its exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=60)
        assert "Traceback" not in err, err
        return self.process.returncode, out, err

    def worker(self) -> psutil.Process:
        (worker,) = psutil.Process(self.process.pid).children()
        return worker


def run(folder: Path, arguments: str) -> tuple[int, str, str]:
    return Command(folder, arguments).end()


def wait_for(happens: Callable[[], object], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def commits(path: Path) -> int:
    return supervisor._commit_number(path) or 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the run that nothing happened to, in this process."""
    place = tmp_path_factory.mktemp("whole")
    write_data(place / "data.npz")
    (place / "it.py").write_text(_FACTORIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done = lowmem_pnn(f"{_FIT} --workdir run --json --quiet")
    assert (done.code, json.loads(done.out)["resumed"]) == (0, 0)
    return (place / "run" / "model.safetensors").read_bytes()


def test_ctrl_c_stops_cleanly_and_the_run_resumes_to_the_same_bits(folder: Path, whole: bytes) -> None:
    (folder / "slow").touch()
    command = Command(folder, f"{_FIT} --workdir run")
    wait_for(lambda: commits(folder / "run") > 3)
    # The supervisor takes little memory meanwhile: a bare interpreter has 3 MB, this command's own would be 20.
    status = Path(f"/proc/{command.process.pid}/status").read_text()
    assert int(status.split("RssAnon:")[1].split()[0]) * 1024 < 8e6
    command.process.send_signal(signal.SIGINT)
    code, out, err = command.end()
    assert (code, out) == (75, "")
    assert (
        err.splitlines()[-1] == "lowmem-pnn: stopped; lowmem-pnn fit --resume --workdir run --trust goes on from the last commit"
    )
    assert not (folder / "run" / "result.json").exists()
    (folder / "slow").unlink()
    assert run(folder, "fit --resume --workdir run --trust")[0] == 0
    assert (folder / "run" / "model.safetensors").read_bytes() == whole


def test_a_signal_while_the_worker_starts_is_not_lost(folder: Path) -> None:
    (folder / "slow").touch()
    command = Command(folder, f"{_FIT} --workdir run")
    wait_for(lambda: psutil.Process(command.process.pid).children())
    time.sleep(0.1)
    command.process.send_signal(signal.SIGTERM)
    code, out, err = command.end()
    assert (code, out) == (75, "")
    assert "stopping after this batch; once more to stop at once" in err
    assert commits(folder / "run") > 0


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_it_at_once(folder: Path, number: signal.Signals, expected: int) -> None:
    (folder / "slow").touch()
    command = Command(folder, f"{_FIT} --workdir run")
    wait_for(lambda: commits(folder / "run") > 3)
    (folder / "stuck").touch()
    time.sleep(0.1)
    worker = command.worker()
    command.process.send_signal(number)
    time.sleep(0.3)
    assert command.process.poll() is None
    command.process.send_signal(number)
    began = time.monotonic()
    code, out, _ = command.end()
    assert (code, out) == (expected, "")
    assert time.monotonic() - began < 5
    assert not worker.is_running()


def test_kill_9_of_the_supervisor_takes_the_worker_with_it(folder: Path, whole: bytes) -> None:
    (folder / "slow").touch()
    command = Command(folder, f"{_FIT} --workdir run")
    wait_for(lambda: commits(folder / "run") > 3)
    worker = command.worker()
    command.process.kill()
    command.process.communicate()
    (folder / "slow").unlink()
    # At once, while the worker is dying.
    code, _, err = run(folder, f"{_FIT} --workdir run --resume --quiet")
    assert (code, err) == (0, "")
    assert not worker.is_running()
    assert (folder / "run" / "model.safetensors").read_bytes() == whole


def test_kill_9_of_the_worker_is_gone_on_from(folder: Path, whole: bytes) -> None:
    (folder / "slow").touch()
    command = Command(folder, f"{_FIT} --workdir run --json --quiet")
    wait_for(lambda: commits(folder / "run") > 3)
    command.worker().kill()
    (folder / "slow").unlink()
    code, out, err = command.end()
    assert code == 0
    assert err == "lowmem-pnn: the worker died of SIGKILL; going on from the last commit\n"
    result = json.loads(out)
    assert (result["resumed"], result["oom_retries"]) == (1, 0)
    assert (folder / "run" / "model.safetensors").read_bytes() == whole


def test_a_crash_is_gone_on_from_with_half_the_micro_batch(folder: Path) -> None:
    (folder / "crash").touch()
    code, out, err = run(folder, f"{_FIT} --workdir run --json --quiet")
    assert code == 0, err
    assert err == (
        "lowmem-pnn: the worker died of SIGSEGV at the memory limit; going on from the last commit with half the micro-batch\n"
    )
    result = json.loads(out)
    assert (result["resumed"], result["oom_retries"]) == (1, 1)
    assert result["partitions"][0]["micro_batch"] == 8
    assert result["partitions"][1]["micro_batch"] == 16


def test_a_crash_before_the_run_began_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert lowmem_pnn(f"{_FIT} --workdir run --quiet").code == 0
    before = (folder / "run" / "journal.json").read_bytes()
    code, out, err = run(folder, f"{_FIT.replace('mlp:20-16-3', 'it.py:dies')} --workdir run --overwrite")
    assert (code, out) == (1, "")
    assert err == (
        "lowmem-pnn: the worker died of SIGSEGV before the run began; give a larger --max-gpu-mem, or set PYTHONFAULTHANDLER=1 "
        "to see where\n"
    )
    assert (folder / "run" / "journal.json").read_bytes() == before, "the run that was there is not gone on with"


# What the supervisor does about the ways in which a worker ends, without workers.


def test_the_signals_are_as_they_were_afterwards(folder: Path) -> None:
    before = [signal.getsignal(number) for number in supervisor.STOP_SIGNALS]
    assert supervise(["--version"], folder / "run") == 0
    assert [signal.getsignal(number) for number in supervisor.STOP_SIGNALS] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(supervisor.STOP_SIGNALS)

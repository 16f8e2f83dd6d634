"""The supervisor: stops, kills and crashes of a training, and what comes of the run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from helpers.commands import lowmem_pnn, write_data
from lowmem_pnn.cli import supervisor
from lowmem_pnn.cli.supervisor import supervise
from lowmem_pnn.errors import BudgetError, LowMemError

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
    """The weights of the run that nothing happened to."""
    place = tmp_path_factory.mktemp("whole")
    write_data(place / "data.npz")
    (place / "it.py").write_text(_FACTORIES)
    code, out, _ = run(place, f"{_FIT} --workdir run --json --quiet")
    assert code == 0
    assert json.loads(out)["resumed"] == 0
    return (place / "run" / "model.safetensors").read_bytes()


def test_ctrl_c_stops_cleanly_and_the_run_resumes_to_the_same_bits(folder: Path, whole: bytes) -> None:
    (folder / "slow").touch()
    command = Command(folder, f"{_FIT} --workdir run")
    wait_for(lambda: commits(folder / "run") > 3)
    command.process.send_signal(signal.SIGINT)
    code, out, err = command.end()
    assert (code, out) == (75, "")
    assert err.splitlines()[-1] == "lowmem-pnn: stopped; lowmem-pnn fit --resume --workdir run goes on from the last commit"
    assert not (folder / "run" / "result.json").exists()
    (folder / "slow").unlink()
    assert run(folder, "fit --resume --workdir run")[0] == 0
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
    code, _, err = run(folder, "fit --resume --workdir run --quiet")
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


class Script:
    """Stands in for workers: each ends as it is told, after it has committed to the run directory."""

    def __init__(self, path: Path, ends: Iterator[tuple[int, int | None, list[int]]], stage: str) -> None:
        self.path, self.ends, self.stage = path, ends, stage
        self.commands: list[list[str]] = []

    def __call__(self, arguments: list[str]) -> tuple[int, list[int]]:
        self.commands.append(list(arguments))
        code, commit, stops = next(self.ends)
        if commit is not None:
            self.path.mkdir(exist_ok=True)
            (self.path / "config.json").touch()
            (self.path / "journal.json").write_text(json.dumps({"body": {"number": commit, "stage": self.stage}}))
        return code, stops


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    def play(*ends: tuple[int, int | None, list[int]], stage: str = "training") -> Script:
        made = Script(tmp_path / "run", iter(ends), stage)
        monkeypatch.setattr(supervisor, "_run_worker", made)
        return made

    return play


_ARGUMENTS = ["fit", "--max-gpu-mem", "1GB", "--json", "--lr", "1", "--debug", "--workdir", "run"]


@pytest.mark.parametrize("code", [0, 3, 75, 130])
def test_the_workers_exit_code_is_handed_on(script: Callable[..., Script], tmp_path: Path, code: int) -> None:
    assert supervise(_ARGUMENTS, script((code, 1, [])).path) == code


def test_a_crashed_worker_is_resumed_by_the_same_command(script: Callable[..., Script]) -> None:
    played = script((-signal.SIGABRT, 1, []), (-signal.SIGKILL, 2, []), (0, 3, []))
    assert supervise([*_ARGUMENTS, "--overwrite"], played.path) == 0
    assert played.commands == [
        [*_ARGUMENTS, "--overwrite"],
        [*_ARGUMENTS, "--resume", "--after-crash"],
        [*_ARGUMENTS, "--resume"],
    ]


def test_a_signal_after_the_run_is_done_is_no_failure(script: Callable[..., Script], capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise(_ARGUMENTS, script((-signal.SIGTERM, 3, [signal.SIGTERM]), stage="done").path) == 0
    assert capsys.readouterr().err == ""
    # The second signal is somebody who wants it to end, and another run in the folder says nothing of this one.
    played = script((-signal.SIGKILL, 4, [signal.SIGTERM, signal.SIGTERM]), stage="done")
    assert supervise(_ARGUMENTS, played.path) == 143
    assert supervise(_ARGUMENTS, script((-signal.SIGTERM, None, [signal.SIGTERM])).path) == 143


def test_a_worker_that_gets_no_further_is_given_up(script: Callable[..., Script]) -> None:
    played = script(*[(-signal.SIGSEGV, 7, [])] * 9)
    with pytest.raises(BudgetError, match=r"the worker died of SIGSEGV 6 times after the same commit of .*; give a larger"):
        supervise(_ARGUMENTS, played.path)
    assert len(played.commands) == 1 + supervisor.MAX_RESTARTS


def test_a_worker_that_gets_on_is_not_given_up(script: Callable[..., Script]) -> None:
    played = script(*[(-signal.SIGSEGV, number, []) for number in range(20)], (0, 20, []))
    assert supervise(_ARGUMENTS, played.path) == 0


def test_a_crash_after_a_stop_was_asked_for_is_the_end(script: Callable[..., Script], capsys: pytest.CaptureFixture[str]) -> None:
    played = script((-signal.SIGSEGV, 1, [signal.SIGINT]))
    assert supervise(_ARGUMENTS, played.path) == 128 + signal.SIGSEGV
    assert len(played.commands) == 1
    text = capsys.readouterr().err
    assert text == (
        f"lowmem-pnn: the worker was ended by SIGSEGV; lowmem-pnn fit --resume --workdir {played.path} goes on from the last commit\n"
    )


def test_a_worker_that_is_ended_before_there_is_a_run(script: Callable[..., Script], capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise(_ARGUMENTS, script((-signal.SIGTERM, None, [])).path) == 143
    assert capsys.readouterr().err == "lowmem-pnn: the worker was ended by SIGTERM before the run began; nothing was written\n"
    with pytest.raises(LowMemError, match="the worker died of SIGSEGV before the run began"):
        supervise(_ARGUMENTS, script((-signal.SIGSEGV, None, [])).path)


def test_another_run_in_the_folder_is_not_resumed(script: Callable[..., Script]) -> None:
    played = script((0, 5, []))
    supervise(_ARGUMENTS, played.path)
    for end in (-signal.SIGSEGV, -signal.SIGBUS):
        with pytest.raises(LowMemError, match="before the run began"):
            supervise([*_ARGUMENTS, "--overwrite"], script((end, None, [])).path)
    # But with --resume it is the one that is meant.
    played = script((-signal.SIGSEGV, None, []), (0, None, []))
    assert supervise(["fit", "--resume", "--workdir", str(played.path)], played.path) == 0


def test_the_signals_are_as_they_were_afterwards(folder: Path) -> None:
    before = [signal.getsignal(number) for number in supervisor.STOP_SIGNALS]
    assert supervise(["--version"], folder / "run") == 0
    assert [signal.getsignal(number) for number in supervisor.STOP_SIGNALS] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(supervisor.STOP_SIGNALS)


def test_a_plan_that_is_timed_runs_with_a_workers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[list[str], str]] = []
    monkeypatch.setattr(os, "execve", lambda _, command, environment: begun.append((command[1:], environment["GLIBC_TUNABLES"])))
    monkeypatch.setattr(sys, "argv", ["lowmem-pnn", "plan", "--max-gpu-mem", "1GB"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    supervisor.as_worker()
    assert not begun, "torch is imported: it is too late"
    monkeypatch.delitem(sys.modules, "torch")
    supervisor.as_worker()
    assert begun == [(["-m", "lowmem_pnn", "plan", "--max-gpu-mem", "1GB"], "glibc.malloc.hugetlb=1")]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    supervisor.as_worker()
    assert len(begun) == 1, "the user has chosen"

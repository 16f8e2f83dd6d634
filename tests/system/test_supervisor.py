"""The supervisor: stops, kills and crashes of a training, and what comes of the run."""

import json
import os
import select
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers.commands import lowmem_pnn
from helpers.processes import SLOW_FIT, Command, commits, run, wait_for, write_slow_data
from lowmem_pnn.cli import supervisor
from lowmem_pnn.cli.supervisor import supervise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_slow_data(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the run that nothing happened to, in this process."""
    place = write_slow_data(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done = lowmem_pnn(f"{SLOW_FIT} --workdir run --json --quiet")
    assert (done.code, json.loads(done.out)["resumed"]) == (0, 0)
    return (place / "run" / "model.safetensors").read_bytes()


def resumed(folder: Path, patch: pytest.MonkeyPatch) -> tuple[int, int, bytes]:
    """Bring a run to its end, in this process: how often it was gone on with, and with smaller micro-batches; its weights."""
    (folder / "slow").unlink()
    patch.chdir(folder)
    done = lowmem_pnn("fit --resume --workdir run --trust --no-report --json --quiet")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    return result["resumed"], result["oom_retries"], (folder / "run" / "model.safetensors").read_bytes()


def test_kill_9_of_the_worker_is_gone_on_from_and_ctrl_c_stops_cleanly(
    folder: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "slow").touch()
    command = Command(folder, f"{SLOW_FIT} --workdir run")
    wait_for(lambda: commits(folder / "run") > 3)
    first = command.worker()
    first.kill()
    before = commits(folder / "run")
    wait_for(lambda: commits(folder / "run") > before + 1)  # of another worker
    assert command.worker().pid != first.pid
    # The supervisor takes little memory meanwhile: a bare interpreter has 3 MB, this command's own would be 20.
    status = Path(f"/proc/{command.process.pid}/status").read_text()
    assert int(status.split("RssAnon:")[1].split()[0]) * 1024 < 8e6
    command.process.send_signal(signal.SIGINT)
    code, out, err = command.end()
    assert (code, out) == (75, "")
    assert "lowmem-pnn: the worker died of SIGKILL; going on from the last commit\n" in err
    assert (
        err.splitlines()[-1] == "lowmem-pnn: stopped; lowmem-pnn fit --resume --workdir run --trust goes on from the last commit"
    )
    assert not (folder / "run" / "result.json").exists()
    assert resumed(folder, monkeypatch) == (2, 0, whole)


def test_a_closed_terminal_stops_cleanly_and_the_run_resumes_to_the_same_bits(folder: Path, whole: bytes) -> None:
    (folder / "slow").touch()
    process, terminal = os.forkpty()
    if process == 0:
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
            os.chdir(folder)
            os.execl(sys.executable, sys.executable, "-m", "lowmem_pnn", *f"{SLOW_FIT} --workdir run".split())
        finally:
            os._exit(99)
    deadline = time.monotonic() + 240
    while commits(folder / "run") <= 3 and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.02)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 75
    assert not (folder / "run" / "result.json").exists()
    (folder / "slow").unlink()
    code, _, err = run(folder, "fit --resume --workdir run --trust --no-report --quiet")
    assert (code, err) == (0, "")
    assert (folder / "run" / "model.safetensors").read_bytes() == whole


def test_a_signal_while_the_worker_starts_is_not_lost(folder: Path) -> None:
    (folder / "slow").touch()
    command = Command(folder, f"{SLOW_FIT} --workdir run")
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
    command = Command(folder, f"{SLOW_FIT} --workdir run")
    wait_for(lambda: commits(folder / "run") > 3)
    (folder / "stuck").touch()
    wait_for((folder / "is stuck").exists)
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


def test_kill_9_of_the_supervisor_takes_the_worker_with_it(folder: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "slow").touch()
    command = Command(folder, f"{SLOW_FIT} --workdir run")
    wait_for(lambda: commits(folder / "run") > 3)
    worker = command.worker()
    command.process.kill()
    command.process.communicate()
    # At once, while the worker is dying.
    assert resumed(folder, monkeypatch) == (1, 0, whole)
    # Whoever has inherited it may not have asked yet how it ended.
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_a_crash_is_gone_on_from_with_half_the_micro_batch(folder: Path) -> None:
    (folder / "crash").touch()
    code, out, err = run(folder, f"{SLOW_FIT} --workdir run --json --quiet")
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
    assert lowmem_pnn(f"{SLOW_FIT} --workdir run --quiet").code == 0
    before = (folder / "run" / "journal.json").read_bytes()
    code, out, err = run(folder, f"{SLOW_FIT.replace('mlp:20-16-3', 'it.py:dies')} --workdir run --overwrite")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "lowmem-pnn: the worker died of SIGSEGV before the run began; give a larger --max-gpu-mem, or set PYTHONFAULTHANDLER=1 "
        "to see where"
    )
    assert (folder / "run" / "journal.json").read_bytes() == before, "the run that was there is not gone on with"


# What the supervisor does about the ways in which a worker ends, without workers.


def test_the_signals_are_as_they_were_afterwards(folder: Path) -> None:
    before = [signal.getsignal(number) for number in supervisor.STOP_SIGNALS]
    assert supervise(["--version"], folder / "run") == 0
    assert [signal.getsignal(number) for number in supervisor.STOP_SIGNALS] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(supervisor.STOP_SIGNALS)

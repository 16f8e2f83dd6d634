"""A run that is killed, stopped or suspended at any moment, and resumed, ends with the bits of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers.commands import lowmem_pnn
from helpers.processes import SLOW_FIT, Command, commits, wait_for, write_slow_data

TESTS = Path(__file__).parents[1]
_WORKER = "SIGKILL of the worker, then SIGTERM"
# By what happens to a command, the code with which it then ends.
_CODES = {
    "SIGSTOP and SIGCONT, then SIGHUP": 75,
    "SIGINT twice": 130,
    _WORKER: 75,
    "SIGTERM": 75,
    "SIGKILL of the supervisor": -signal.SIGKILL,
}


@pytest.mark.slow
def test_killed_anywhere_and_resumed_is_same_as_uninterrupted(
    tmp_path: Path, long: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = 500 if long else 0
    # A few of each kind: with three of the methods, and with clipping and half precision. Sweeps that are stopped are in tests/runs.
    names = [] if long else ["pnn", "neuroflux, interleaved", "incubate"]
    done = subprocess.run(
        [sys.executable, "-m", "trials.kills", str(tmp_path / "trials"), str(kills), "0", *names],
        cwd=TESTS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print("\n" + done.stdout if long else "", end="")
    tallies = json.loads(done.stdout.splitlines()[-1]).values()
    assert [tally["failed"] for tally in tallies if tally["failed"]] == [], done.stderr
    assert all(tally["trials"] == tally["identical"] > 0 for tally in tallies)
    assert sum(tally["killed"] for tally in tallies) >= (kills or 20)
    kinds = {kind for tally in tallies for kind in tally["kinds"]}
    assert {"born", "synced p#.g#.safetensors", "renamed index.json", "renamed journal.json", "discarded"} <= kinds
    assert {"renamed model.safetensors", "renamed heads.safetensors", "renamed result.json"} <= kinds


@pytest.mark.slow
def test_signals_one_after_the_other_and_resumed_is_same_as_uninterrupted(
    tmp_path: Path, long: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(write_slow_data(tmp_path))
    assert lowmem_pnn(f"{SLOW_FIT} --workdir whole --quiet").code == 0
    # The others, one at a time, are in test_supervisor.py.
    kinds, rounds = (list(_CODES), 6) if long else (list(_CODES)[:2], 1)
    chance = random.Random(0)
    for number in range(rounds):
        run = Path(f"run{number}")
        order = list(kinds)
        chance.shuffle(order)
        for place, kind in enumerate(order):
            _interrupt(kind, f"{SLOW_FIT} --workdir {run}{' --resume' if place else ''}", run, chance)
            assert not (run / "result.json").exists()
        assert lowmem_pnn(f"fit --resume --workdir {run} --trust").code == 0
        restarts = kinds.count(_WORKER)
        assert json.loads((run / "result.json").read_text())["resumed"] == len(kinds) + restarts
        assert (run / "model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    if long:
        with capsys.disabled():
            print("".join(f"\n| {kind} | {rounds} | {rounds} |" for kind in kinds))


def _interrupt(kind: str, arguments: str, run: Path, chance: random.Random) -> None:
    """Have a command end by a signal, a few commits further on."""

    def wait_for_commit() -> None:
        before = commits(run)
        wait_for(lambda: commits(run) > before)

    slow, stuck = Path("slow"), Path("stuck")
    slow.write_text("0.05")  # seconds for a sample
    command = Command(Path(), arguments)
    wait_for_commit()
    time.sleep(chance.uniform(0, 0.2))  # somewhere in a batch
    worker = command.worker()
    if kind == _WORKER:
        worker.kill()
        wait_for_commit()  # of another worker
        command.process.send_signal(signal.SIGTERM)
    elif kind == "SIGTERM":
        command.process.send_signal(signal.SIGTERM)
    elif kind == "SIGKILL of the supervisor":
        command.process.kill()
    elif kind == "SIGINT twice":
        stuck.touch()
        time.sleep(0.2)
        command.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        command.process.send_signal(signal.SIGINT)
    else:
        for process in (command.process, worker):
            process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        for process in (worker, command.process):
            process.send_signal(signal.SIGCONT)
        wait_for_commit()
        command.process.send_signal(signal.SIGHUP)
    assert command.end()[0] == _CODES[kind]
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    stuck.unlink(missing_ok=True)
    slow.unlink()

"""A run that is killed, stopped or suspended at any moment, and resumed, ends with the bits of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.commands import lowmem_pnn
from helpers.processes import SLOW_FIT, Command, commits, wait_for, write_slow_data

TESTS = Path(__file__).parents[1]
SIGNALS = ("SIGSTOP and SIGCONT, then SIGHUP", "SIGKILL of the worker", "SIGTERM", "SIGINT twice", "SIGKILL of the supervisor")


@pytest.mark.slow
def test_killed_anywhere_and_resumed_is_same_as_uninterrupted(
    tmp_path: Path, long: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = 500 if long else 0
    # A few of each kind: with all methods but one, and with clipping, half precision and tied weights.
    names = [] if long else ["pnn", "exact", "neuroflux, interleaved", "backprop"]
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
@pytest.mark.parametrize("number", range(12))
def test_signals_one_after_the_other_and_resumed_is_same_as_uninterrupted(
    number: int, tmp_path: Path, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if number and not long:
        pytest.skip("with --long, in other orders, at other moments")
    monkeypatch.chdir(write_slow_data(tmp_path))
    assert lowmem_pnn(f"{SLOW_FIT} --workdir whole --quiet").code == 0
    chance = random.Random(number)
    order = list(SIGNALS)
    if number:
        chance.shuffle(order)
    for place, kind in enumerate(order):
        _interrupt(kind, f"{SLOW_FIT} --workdir run{' --resume' if place else ''}", chance)
        assert not Path("run/result.json").exists()
    assert lowmem_pnn("fit --resume --workdir run --trust").code == 0
    assert json.loads(Path("run/result.json").read_text())["resumed"] == len(SIGNALS) + 1
    assert Path("run/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def _interrupt(kind: str, arguments: str, chance: random.Random) -> None:
    """Run a command that a signal ends a few commits further on."""
    slow, stuck = Path("slow"), Path("stuck")
    slow.write_text("0.01")
    before = commits(Path("run"))
    command = Command(Path(), arguments)
    wait_for(lambda: commits(Path("run")) >= before + 1)
    time.sleep(chance.uniform(0, 0.05))  # somewhere in a batch
    worker = command.worker()
    if kind == "SIGKILL of the worker":
        worker.kill()
        before = commits(Path("run"))
        wait_for(lambda: commits(Path("run")) > before)  # its supervisor has started another
        command.process.send_signal(signal.SIGTERM)
    elif kind == "SIGINT twice":
        stuck.touch()
        time.sleep(0.2)
        command.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        command.process.send_signal(signal.SIGINT)
    elif kind == "SIGTERM":
        command.process.send_signal(signal.SIGTERM)
    elif kind == "SIGKILL of the supervisor":
        command.process.kill()
    else:
        for process in (command.process, worker):
            process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        for process in (worker, command.process):
            process.send_signal(signal.SIGCONT)
        before = commits(Path("run"))
        wait_for(lambda: commits(Path("run")) > before)
        command.process.send_signal(signal.SIGHUP)
    codes = {"SIGINT twice": 130, "SIGTERM": 75, "SIGKILL of the worker": 75, "SIGKILL of the supervisor": -signal.SIGKILL}
    assert command.end()[0] == codes.get(kind, -signal.SIGHUP)
    wait_for(lambda: not worker.is_running() or worker.status() == "zombie")
    stuck.unlink(missing_ok=True)
    slow.unlink()

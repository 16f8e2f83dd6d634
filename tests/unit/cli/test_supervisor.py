"""What the supervisor does about the ways in which a worker ends, without workers."""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lowmem_pnn.cli import supervisor
from lowmem_pnn.cli.supervisor import supervise
from lowmem_pnn.errors import BudgetError, LowMemError
from lowmem_pnn.memory.tunables import with_tunables


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
        monkeypatch.setattr(supervisor, "monotonic", itertools.count(0.0, 3600.0).__next__)  # each worker takes an hour
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
        [*_ARGUMENTS, "--resume", "--after-crash", "--seconds-spent", "3600"],
        [*_ARGUMENTS, "--resume", "--seconds-spent", "7200"],
    ]


def test_a_worker_that_gets_no_further_is_given_up(script: Callable[..., Script]) -> None:
    played = script(*[(-signal.SIGSEGV, 7, [])] * 9)
    with pytest.raises(
        BudgetError, match=r"the worker died of SIGSEGV 6 times after the same commit of .*; begin a new run with a larger"
    ):
        supervise(_ARGUMENTS, played.path)
    assert len(played.commands) == 1 + supervisor.MAX_RESTARTS


def test_a_worker_that_gets_on_is_not_given_up(script: Callable[..., Script]) -> None:
    played = script(*[(-signal.SIGSEGV, number, []) for number in range(20)], (0, 20, []))
    assert supervise(_ARGUMENTS, played.path) == 0


def test_a_crash_after_a_stop_was_asked_for_is_the_end(script: Callable[..., Script], capsys: pytest.CaptureFixture[str]) -> None:
    played = script((-signal.SIGSEGV, 1, [signal.SIGINT]))
    assert supervise(_ARGUMENTS, played.path) == 128 + signal.SIGSEGV
    assert len(played.commands) == 1
    told = capsys.readouterr()
    assert told.err == (
        f"lowmem-pnn: the worker was ended by SIGSEGV; lowmem-pnn fit --resume --workdir {played.path} goes on from the last commit\n"
    )
    assert json.loads(told.out)["exit_code"] == 139, "the worker cannot say it in JSON any more"


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


def test_a_plan_that_is_timed_runs_with_a_workers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[list[str], str]] = []
    monkeypatch.setattr(os, "execve", lambda _, command, environment: begun.append((command[1:], environment["GLIBC_TUNABLES"])))
    monkeypatch.setattr(sys, "argv", ["lowmem-pnn", "plan", "--max-gpu-mem", "1GB"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setitem(sys.modules, "torch", sys)
    supervisor.as_worker()
    assert not begun, "torch is imported: it is too late"
    monkeypatch.delitem(sys.modules, "torch")
    supervisor.as_worker()
    assert begun == [(["-m", "lowmem_pnn", "plan", "--max-gpu-mem", "1GB"], with_tunables(""))]
    monkeypatch.setenv("GLIBC_TUNABLES", with_tunables("glibc.malloc.hugetlb=0"))
    supervisor.as_worker()
    assert len(begun) == 1, "the user has chosen"


def test_a_signal_after_the_run_is_done_is_no_failure(script: Callable[..., Script], capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise(_ARGUMENTS, script((-signal.SIGTERM, 3, [signal.SIGTERM]), stage="done").path) == 0
    assert capsys.readouterr().err == ""
    # The second signal is somebody who wants it to end, and another run in the folder says nothing of this one.
    played = script((-signal.SIGKILL, 4, [signal.SIGTERM, signal.SIGTERM]), stage="done")
    assert supervise(_ARGUMENTS, played.path) == 143
    assert supervise(_ARGUMENTS, script((-signal.SIGTERM, None, [signal.SIGTERM])).path) == 143


def test_hangups_count_once_and_not_where_they_are_ignored() -> None:
    assert not supervisor.is_repeated_hangup(signal.SIGHUP, [])
    assert supervisor.is_repeated_hangup(signal.SIGHUP, [signal.SIGHUP])
    assert supervisor.is_repeated_hangup(signal.SIGHUP, [signal.SIGTERM])
    assert not supervisor.is_repeated_hangup(signal.SIGTERM, [signal.SIGHUP])
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert supervisor.stop_signals() == (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert supervisor.stop_signals() == (signal.SIGINT, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("more", "shown"), [([], False), (["--json"], True)])
def test_what_the_supervisor_gives_up_on_is_said_as_a_worker_says_it(
    more: list[str], shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def give_up(*_: object) -> int:
        raise BudgetError("it died; give a larger --max-gpu-mem")

    monkeypatch.setattr(supervisor, "supervise", give_up)
    monkeypatch.setattr(sys, "argv", ["-c", "runs/a", "fit", *more])
    with pytest.raises(SystemExit) as ended:
        supervisor.main()
    told = capsys.readouterr()
    assert ended.value.code == 4
    assert told.err == "lowmem-pnn: it died; give a larger --max-gpu-mem\n"
    error = {"schema_version": 1, "error": "it died; give a larger --max-gpu-mem", "exit_code": 4, "enough_bytes": None}
    assert told.out == (json.dumps(error) + "\n" if shown else "")

"""The supervisor: runs the training in a worker process, passes signals on, and restarts a worker that died at the wall.

At the wall PyTorch mostly raises, and the executor shrinks the micro-batch. But a library that does not check an allocation dies of a
signal instead; then the work goes on from the journal, in a new process, with half the micro-batch.

The supervisor's own memory comes on top of the worker's, so it is a fresh interpreter that imports next to nothing.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

from lowmem_pnn.config.code import command_to_resume
from lowmem_pnn.errors import BudgetError, LowMemError
from lowmem_pnn.memory.cgroup import oom_kills
from lowmem_pnn.memory.tunables import with_tunables
from lowmem_pnn.reporting.page_process import PAGE, has_new_page, write_page_apart
from lowmem_pnn.reporting.streams import drop

WORKER_VARIABLE = "LOWMEM_PNN_WORKER"
MAX_RESTARTS = 5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# What an unchecked allocation failure looks like from outside.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
_PR_SET_PDEATHSIG = 1


def is_worker() -> bool:
    """Whether this process was started by a supervisor."""
    return WORKER_VARIABLE in os.environ


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that stop this process: a terminal that is closed (SIGHUP) does, unless it was begun to outlive it (nohup)."""
    return tuple(number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN)


def is_repeated_hangup(number: int, received: Sequence[int]) -> bool:
    """Decide whether a signal says nothing new after those that a process has received.

    A terminal that is closed sends SIGHUP more than once, by the kernel and by the shell, and a session that ends sends it after
    SIGTERM: nobody has asked twice.
    """
    return number == signal.SIGHUP and bool(received)


def begin_supervisor(arguments: Sequence[str], workdir: Path) -> NoReturn:
    """Become the supervisor of a worker: this process goes on as `main`, in a fresh interpreter.

    Args:
        arguments: as for `supervise`.
        workdir: as for `supervise`.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    # Until the supervisor has its handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # Without site-packages, which it does not need, and which may import more at the start.
    code = f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); from lowmem_pnn.cli.supervisor import main; main()"
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", code, str(workdir), *arguments])


def main() -> NoReturn:
    """Supervise the command in `sys.argv`, after the run's folder, and exit with its code."""
    arguments, workdir = sys.argv[2:], Path(sys.argv[1])
    try:
        code = supervise(arguments, workdir)
        if code == 0:
            write_run_page(arguments, workdir)
    except LowMemError as error:
        code = _fail(arguments, str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _fail(arguments, "stopped", 130)
    sys.exit(code)


def supervise(arguments: Sequence[str], workdir: Path) -> int:
    """Run `lowmem-pnn ARGUMENTS` in a worker until it ends.

    Args:
        arguments: of the command, without the program's name; they name `workdir`.
        workdir: the run directory, whose journal tells whether a restarted worker gets on.

    Returns:
        The worker's exit code; 128 + N where signal N ended it and it was not restarted.

    Raises:
        BudgetError: the worker keeps dying at the same place.
        LowMemError: it died of a fault before there was a run to go on with.
    """
    # What is there before a new run is born is another run: not to be gone on with.
    other = None if "--resume" in arguments else _identity(workdir)
    restarts, reached, began = 0, -1, monotonic()
    command = list(arguments)
    while True:
        kills_before = oom_kills()
        code, stops = _run_worker(command)
        if code >= 0:
            return code
        if len(stops) > 1:
            return 128 + stops[-1]
        if stops and _identity(workdir) != other and _is_done(workdir):
            return 0  # the signal came while the worker, whose result is printed, was leaving
        number = signal.Signals(-code)
        crashed = number in _CRASHES or (number == signal.SIGKILL and oom_kills() > kills_before)
        position = _commit_number(workdir) if _identity(workdir) != other else None
        if position is None and crashed:
            raise LowMemError(
                f"the worker died of {number.name} before the run began; give a larger --max-gpu-mem, or set PYTHONFAULTHANDLER=1 "
                "to see where"
            )
        # Killed by hand, going on changes nothing in the result.
        if position is None or stops or not (crashed or number == signal.SIGKILL):
            return _fail(arguments, f"the worker was ended by {number.name}{_resume_hint(workdir, position)}", 128 + number)
        restarts = restarts + 1 if position == reached else 1
        reached = position
        if restarts > MAX_RESTARTS:
            raise BudgetError(
                f"the worker died of {number.name} {restarts} times after the same commit of {workdir}; "
                f"begin a new run with a larger --max-gpu-mem"
            )
        why = " at the memory limit; going on from the last commit with half the micro-batch"
        _say(f"the worker died of {number.name}{why if crashed else '; going on from the last commit'}")
        command = [
            *(argument for argument in arguments if argument not in ("--overwrite", "--resume")),
            "--resume",
            *(["--after-crash"] if crashed else []),
            "--seconds-spent",  # of a --time-limit, wherever that was given
            f"{monotonic() - began:.0f}",
        ]


def write_run_page(arguments: Sequence[str], workdir: Path) -> None:
    """Write the page of a run that is done. Its result is printed by now: whatever happens here loses the page alone.

    Args:
        arguments: of the command, which may ask for no page.
        workdir: the run directory.
    """
    if "--no-report" in arguments or not _is_done(workdir) or has_new_page(workdir):
        return
    fault = write_page_apart([workdir], stop_on=stop_signals(), before=_die_with(os.getpid()))
    if "--quiet" not in arguments:
        _say(f"no page of the run: {fault}" if fault else f"the page of the run is in {workdir / PAGE}")


def _die_with(parent: int) -> Callable[[], None]:
    """Return what a child of this process does first: the kernel then kills it when its parent is killed (Linux)."""
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        if sys.platform.startswith("linux"):
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    return die_with_parent


def _run_worker(arguments: Sequence[str]) -> tuple[int, list[int]]:
    """Run one worker; its exit code, negative for a signal, and the signals that this process was asked to stop with."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        if is_repeated_hangup(number, received):
            return
        received.append(number)
        # The second ends the worker whatever it is in: its own handler would wait for a long operation to return.
        with suppress(ProcessLookupError):
            worker.send_signal(signal.SIGKILL if len(received) > 1 else number)

    # Blocked until both sides can handle them: the worker takes its signals when it is past its imports.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    before: dict[signal.Signals, Any] = {}
    try:
        # A session of its own: a terminal's Ctrl-C reaches only the supervisor, which passes it on once.
        worker = subprocess.Popen(
            [sys.executable, "-m", "lowmem_pnn", *arguments],
            env={**os.environ, WORKER_VARIABLE: "1", "GLIBC_TUNABLES": with_tunables(os.environ.get("GLIBC_TUNABLES", ""))},
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),  # so that the run is free to be resumed
        )
        before = {number: signal.signal(number, forward) for number in stop_signals()}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        return worker.wait(), received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_worker() -> None:
    """Begin the command anew as a worker runs, if it does not yet, so that what is timed is what training will take."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform.startswith("linux") and tunables != with_tunables(tunables) and "torch" not in sys.modules:
        environment = {**os.environ, "GLIBC_TUNABLES": with_tunables(tunables)}
        os.execve(sys.executable, [sys.executable, "-m", "lowmem_pnn", *sys.argv[1:]], environment)


def _identity(workdir: Path) -> tuple[int, int] | None:
    """What tells a run from one that was in the same folder before; None where there is none."""
    with suppress(OSError):
        status = (workdir / "config.json").stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _commit_number(workdir: Path) -> int | None:
    """Return the number of a run's last commit; None where no run is."""
    with suppress(ValueError, KeyError, TypeError):
        return int(_read(workdir / "journal.json")["body"]["number"])
    return None


def _is_done(workdir: Path) -> bool:
    """Whether a run has its result."""
    with suppress(KeyError, TypeError):
        return bool(_read(workdir / "journal.json")["body"]["stage"] == "done")
    return False


def _resume_hint(workdir: Path, position: int | None) -> str:
    if position is None:
        return " before the run began; nothing was written"
    return f"; {command_to_resume(_read(workdir / 'config.json'), workdir)} goes on from the last commit"


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a run; an empty one where there is none."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        # Not blocking: it may be a pipe.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            content = json.loads(file.read(1 << 26))
        return content if isinstance(content, dict) else {}
    return {}


def _fail(arguments: Sequence[str], text: str, code: int) -> int:
    """Say in a line what went wrong, with --json as JSON on standard output too, as the worker would have; return the exit code."""
    _say(text)
    if "--json" in arguments:
        try:
            print(json.dumps({"schema_version": 1, "error": text, "exit_code": code, "enough_bytes": None}), flush=True)
        except (OSError, ValueError):
            drop(sys.stdout)
    return code


def _say(text: str) -> None:
    """Tell people something on standard error, if it can be written to."""
    try:
        print(f"lowmem-pnn: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drop(sys.stderr)

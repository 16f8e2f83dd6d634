"""The page process: writes the page of a finished run apart, so that what draws it is in no floor, no budget and no start-up."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

PAGE = "report.html"
"""Name of the page in a run's folder."""

# A page takes seconds; one that takes minutes hangs, on a network drive or in a library.
_MOST_SECONDS = 120.0


def write_page_apart(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    stop_on: Sequence[signal.Signals] = (),
    before: Callable[[], None] | None = None,
) -> str:
    """Write a page in a process of its own, and wait for it.

    Args:
        runs: folders of finished runs.
        out: the HTML file; None takes the place that the command `report` takes.
        stop_on: signals that end the page, and nothing else.
        before: called in the new process before the command begins.

    Returns:
        Why there is no page, in a line; an empty text where there is one.
    """
    command = [sys.executable, "-m", "lowmem_pnn", "report", "--quiet", *(["--out", str(out)] if out is not None else [])]
    stopped: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        with suppress(ProcessLookupError):
            process.kill()

    # Blocked until there is a process to end.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, stop_on)
    handlers = {}
    try:
        process = subprocess.Popen(
            [*command, "--", *map(str, runs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # A terminal's Ctrl-C reaches this process alone.
            start_new_session=True,
            preexec_fn=before,
        )
        handlers = {number: signal.signal(number, stop) for number in stop_on}
    except OSError as error:
        return (error.strerror or str(error)).lower()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        _, said = process.communicate(timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"it took more than {_MOST_SECONDS:.0f} s"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if process.returncode == 0:
        return ""
    if stopped:
        return "it was stopped"
    if process.returncode < 0:
        return f"it was ended by {signal.Signals(-process.returncode).name}"
    lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
    return lines[-1].removeprefix("lowmem-pnn: ")


def has_new_page(workdir: Path) -> bool:
    """Return whether a run has a page that is not older than its result."""
    with suppress(OSError):
        return (workdir / PAGE).stat().st_mtime_ns >= (workdir / "result.json").stat().st_mtime_ns
    return False

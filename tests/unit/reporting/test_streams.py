"""Streams that break: what was to be shown is left out, and nothing else happens."""

import io
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers.displays import Tee, tell
from lowmem_pnn.reporting.progress import TerminalDisplay
from lowmem_pnn.reporting.streams import UnbreakableStream


class Broken(io.StringIO):
    """Takes a few texts, and then raises."""

    def __init__(self, error: Exception, at: int, terminal: bool) -> None:
        super().__init__()
        self.error, self.left, self.terminal = error, at, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


ERRORS = [
    OSError(5, "Input/output error"),
    OSError(28, "No space left on device"),
    BrokenPipeError(32, "Broken pipe"),
    ValueError("I/O operation on closed file"),
]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_display_that_cannot_be_written_falls_silent(
    error: Exception, at: int, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    tell(TerminalDisplay(Console(file=Broken(error, at, terminal), force_terminal=terminal, width=200)))
    assert failures == []


def test_what_a_broken_stream_holds_is_dropped(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        stream = UnbreakableStream(full)
        assert stream.write("progress") == 8
        assert not stream.is_silent, "it is still in memory"
        stream.flush()
        assert stream.is_silent
        assert Path(f"/proc/self/fd/{full.fileno()}").readlink() == Path("/dev/null")
        assert stream.write("more") == 4
    with (tmp_path / "log").open("w") as log:
        stream = UnbreakableStream(log)
        stream.write("progress")
        assert (stream.fileno(), stream.isatty(), stream.encoding) == (log.fileno(), False, log.encoding)
    assert (tmp_path / "log").read_text() == "progress"
    assert UnbreakableStream(None).write("nowhere") == 7


def test_letters_that_a_stream_has_no_bytes_for_are_written_as_numbers(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="ascii") as log:
        stream = UnbreakableStream(log)
        assert stream.write("caf\udce9.png, \N{SNOWMAN}\n") == 12
        assert not stream.is_silent
    assert (tmp_path / "log").read_text() == "caf\\udce9.png, \\u2603\n"


def test_a_stream_of_somebodys_own_may_break() -> None:
    class Own(Tee):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    stream = UnbreakableStream(Own())  # type: ignore[arg-type]
    assert (stream.write("progress"), stream.is_silent, stream.isatty()) == (8, True, False)
    with pytest.raises(io.UnsupportedOperation):
        stream.fileno()

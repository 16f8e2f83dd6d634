"""What a run tells people: two live lines on a terminal, plain lines elsewhere."""

import re
import sys
import time
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from helpers.displays import LINE, Tee, Terminal, status, tell
from lowmem_pnn.reporting import progress
from lowmem_pnn.reporting.progress import Display, TerminalDisplay

EPOCH = (
    "partition 1 of 2, epoch 1: loss 0.25, validation 0.5, accuracy 75.0%, 1234 samples/s, peak 42.0 MB; waiting for: disk 12 %"
)


def shown(terminal: bool, **more: Any) -> str:
    text = Terminal() if terminal else StringIO()
    tell(TerminalDisplay(Console(file=text, force_terminal=terminal, width=200, **more)))
    return text.getvalue()


def test_on_a_terminal_stages_and_batches_are_live_and_epochs_leave_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.0)
    text = shown(terminal=True)
    assert "planning ... 0:00" in text
    assert "model: mlp:64-32-10" in text
    assert EPOCH + "\r\n" in text.replace("\n", "\r\n").replace("\r\r", "\r")
    assert "partition 1 of 2: writing its outputs (train) ... 0:00" in text
    assert "going on with a micro-batch of 8" in text


def test_without_colours_none_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown(terminal=True))


@pytest.mark.parametrize("more", [{"terminal": False}, {"terminal": True, "_environ": {"TERM": "dumb"}}])
def test_elsewhere_lines_are_plain(more: dict[str, Any]) -> None:
    assert shown(**more) == (f"planning\nmodel: mlp:64-32-10\nbudget: 100.0 MB\n{EPOCH}\ngoing on with a micro-batch of 8\n")


def test_elsewhere_epochs_are_told_now_and_then() -> None:
    text = StringIO()
    display = TerminalDisplay(Console(file=text, force_terminal=False, width=200))
    display.start_epoch("partition 1 of 1 (0)", 0, 9, 10, 0)
    for number in range(9):
        display.end_epoch({**LINE, "epoch": number + 1})
    assert text.getvalue().count("\n") == 1


@pytest.mark.parametrize("width", [30, 80, 200])
def test_the_live_lines_fit_the_terminal_and_say_how_far_the_whole_run_is(width: int) -> None:
    display = TerminalDisplay(Console(file=StringIO(), force_terminal=False, width=width))
    display.start_epoch("partition 1 of 2 (a.layer.with.a.long.name to another.one)", 0, 3, 100, 0)
    now = time.monotonic()
    display._looked, display._status = now, status(50)
    display._visit_began = display._run_began = now - 60, 0.0
    display._epoch_began = now - 60, 0
    first, second = display._render().plain.split("\n")
    assert max(len(first), len(second)) <= width
    assert first.startswith("  8 % ")
    if width >= 80:
        assert first.endswith("partition 1 of 2 · epoch 1 of 3 · 5:00 left, 11:00 in all")
        assert second == "loss 0.25 · 0.83 samples/s · █░░░░░░░ 10.0 MB of 100.0 MB · written 1.0 MB"


def test_without_validation_nothing_is_said_of_it() -> None:
    text = Terminal()
    display = TerminalDisplay(Console(file=text, force_terminal=True, width=200))
    display.start_epoch("partition 1 of 1 (0)", 0, 1, 10, 0)
    display.end_epoch({**LINE, "val_loss": None, "val_accuracy": None})
    display.close()
    assert "loss 0.25, 1234 samples/s" in text.getvalue()


def test_the_silent_display_takes_every_event(capsys: Any) -> None:
    tell(Display())
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("verbose", "terminal", "shows"), [(None, True, True), (None, False, False), (False, True, False), (True, False, True)]
)
def test_a_call_from_python_shows_progress_in_a_terminal(
    verbose: bool | None, terminal: bool, shows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", stream)
    display = progress.default_display(verbose)
    display.close()
    assert isinstance(display, TerminalDisplay) == shows


def test_nothing_is_live_before_the_first_stage_and_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    text, own, out = Terminal(), Terminal(), StringIO()
    monkeypatch.setattr("sys.stderr", own)
    monkeypatch.setattr("sys.stdout", out)
    display = TerminalDisplay(Console(file=text, force_terminal=True, width=200))
    display.message("a fault comes next")
    assert (text.getvalue(), sys.stderr) == ("a fault comes next\n", own), "the terminal is as it was"
    display.stage("planning")
    assert "\x1b[?25l" in text.getvalue(), "the cursor is hidden"
    assert sys.stdout is out, "what is printed to a file goes there"
    display.close()
    display.close()
    assert text.getvalue().rindex("\x1b[?25h") > text.getvalue().rindex("\x1b[?25l")
    assert sys.stderr is own
    display.message("the model holds the trained weights")
    assert text.getvalue().endswith("the model holds the trained weights\n")


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_file_gets_plain_lines_whatever_variables_say(variable: str) -> None:
    text = StringIO()
    tell(TerminalDisplay(Console(file=text, width=200, _environ={variable: "1"})))
    assert text.getvalue().startswith("planning\nmodel: mlp:64-32-10\n")
    assert "\x1b" not in text.getvalue()


def test_messages_are_shown_as_they_are() -> None:
    text = StringIO()
    TerminalDisplay(Console(file=text, force_terminal=False, width=200)).message("[bold] :key: train.py:factory: :train:")
    assert text.getvalue() == "[bold] :key: train.py:factory: :train:\n"


@pytest.mark.parametrize(("verbose", "shown"), [(None, ""), (True, "planning\n")])
def test_a_stream_in_the_place_of_standard_error_need_not_know_what_a_terminal_is(
    verbose: bool | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", stream := Tee())
    display = progress.default_display(verbose)
    display.stage("planning")
    display.close()
    assert stream.text == shown

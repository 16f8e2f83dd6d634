"""What a run tells people: a live line on a terminal, nothing but messages elsewhere."""

from io import StringIO
from typing import Any

from rich.console import Console

from helpers.displays import LINE, tell
from lowmem_pnn.reporting.progress import Display, TerminalDisplay


def shown(terminal: bool) -> str:
    text = StringIO()
    tell(TerminalDisplay(Console(file=text, force_terminal=terminal, width=200)))
    return text.getvalue()


def test_on_a_terminal_an_epoch_leaves_a_line() -> None:
    text = shown(terminal=True)
    assert "partition 1 of 2 (0 to 2), epoch 1: loss 0.25, validation 0.5, accuracy 75.0%, 1234 samples/s, peak 42.0 MB" in text
    assert "peak 42.0 MB; waiting for: disk 12 %, copy 0 %, data 3 %" in text
    assert "10.0 MB of 100.0 MB" in text
    assert "writing its outputs (train)" in text
    assert "going on with a micro-batch of 8" in text


def test_elsewhere_only_messages_are_printed() -> None:
    assert shown(terminal=False) == "going on with a micro-batch of 8\n"


def test_without_validation_nothing_is_said_of_it() -> None:
    text = StringIO()
    display = TerminalDisplay(Console(file=text, force_terminal=True, width=200))
    display.start_epoch("partition 1 of 1 (0)", 0, 1, 10, 0)
    display.end_epoch({**LINE, "val_loss": None, "val_accuracy": None})
    display.close()
    assert "loss 0.25, 1234 samples/s" in text.getvalue()


def test_the_silent_display_takes_every_event(capsys: Any) -> None:
    tell(Display())
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""

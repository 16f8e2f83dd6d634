"""Progress display: two live lines on a terminal, plain lines elsewhere; it falls silent where it cannot be written."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lowmem_pnn.engine.stalls import describe_stalls
from lowmem_pnn.reporting.live_line import live_lines
from lowmem_pnn.reporting.run_status import RunStatus
from lowmem_pnn.reporting.streams import UnbreakableStream, is_terminal
from lowmem_pnn.reporting.tables import wrapped
from lowmem_pnn.units import clock_text, format_bytes

# Seconds between two looks at a run, and between two lines about epochs where nothing is live.
_LOOK_SECONDS, _LINE_SECONDS = 0.1, 10.0
# Share of the time from which on it is said what was waited for.
_WAITED = 0.1


class Display:
    """Receiver of a run's events that shows nothing; the base of every display."""

    def stage(self, text: str) -> None:
        """Take note that a stage begins: opening data, planning, and what else comes before and after training."""

    def header(self, lines: Sequence[str]) -> None:
        """Take note of what is going to be trained, and how, right before the first step."""

    def enter(self, title: str) -> None:
        """Take note that a partition is being loaded onto the device."""

    def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
        """Take note that an epoch begins, or goes on after `done` samples."""

    def start_emit(self, title: str, split: str, num_samples: int) -> None:
        """Take note that the outputs of a partition are being written."""

    def advance(self, status: Callable[[], RunStatus]) -> None:
        """Take note that a batch is done; `status` says how far the run is, for those who want to know."""

    def end_epoch(self, line: dict[str, Any]) -> None:
        """Take note that an epoch ended; `line` is its line of `metrics.jsonl`."""

    def message(self, text: str) -> None:
        """Tell people something."""

    def close(self) -> None:
        """Take note that the run ended."""


def default_display(verbose: bool | None) -> Display:
    """Return the display of a call from Python.

    Args:
        verbose: whether progress is shown; None shows it in a terminal and in a notebook.
    """
    if verbose is None:
        verbose = is_terminal(sys.stderr) or (sys.stderr is not None and "ipykernel" in sys.modules)
    return TerminalDisplay(Console(stderr=True)) if verbose else Display()


class TerminalDisplay(Display):
    """Display with two live lines on a terminal and a line per finished epoch; elsewhere plain lines, of epochs one in ten seconds.

    Lines are live from the first stage to `close`, which leaves the terminal as it was.

    Args:
        console: Console on standard error.
    """

    def __init__(self, console: Console) -> None:
        # The console may say so of a file too, in whose lines codes that move a cursor have no place (FORCE_COLOR).
        is_live = is_terminal(console.file) and console.is_terminal and not console.is_dumb_terminal
        # A console that cannot write would raise, in its own thread too, or end the process.
        console.file = UnbreakableStream(console.file)  # type: ignore[assignment,arg-type]
        self._console = console
        self._live: Live | None = None
        self._stage: tuple[str, float] | None = None
        self._title, self._epoch = "", ""
        self._status: RunStatus | None = None
        self._looked = self._printed = 0.0
        # When the epoch, the visit and the run began here, and how far they were.
        self._epoch_began, self._visit_began, self._run_began = (0.0, 0), (0.0, 0.0), (0.0, 0.0)
        if is_live:
            self._live = Live(
                console=console,
                get_renderable=self._render,
                refresh_per_second=8,
                transient=True,
                # What is printed meanwhile goes above the live lines, if it goes to the terminal at all.
                redirect_stdout=is_terminal(sys.stdout),
                redirect_stderr=is_terminal(sys.stderr),
            )

    def stage(self, text: str) -> None:
        """Show the stage with the seconds that it takes; elsewhere print it."""
        if self._live is None:
            self.message(text)
        self._stage, self._status = (text, time.monotonic()), None
        self._begin_live()
        if self._live is not None:
            self._live.refresh()

    def header(self, lines: Sequence[str]) -> None:
        """Print the header."""
        for line in lines:
            self.message(line)

    def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
        """Show how far the epoch is."""
        short = title.partition(" (")[0]
        if short != self._title:
            self._visit_began = (0.0, 0.0)
        self._title, self._epoch = short, f"epoch {epoch + 1} of {epochs}"
        self._epoch_began = time.monotonic(), done
        self._stage = None
        self._begin_live()

    def start_emit(self, title: str, split: str, num_samples: int) -> None:
        """Show that the outputs of a partition are being written."""
        self._stage = (f"{title.partition(' (')[0]}: writing its outputs ({split})", time.monotonic())
        self._begin_live()

    def advance(self, status: Callable[[], RunStatus]) -> None:
        """Show how far the run is."""
        now = time.monotonic()
        if self._live is None or now - self._looked < _LOOK_SECONDS:
            return
        self._looked, self._status = now, status()
        if not self._visit_began[0]:
            self._visit_began = now, self._status.visit_share
        if not self._run_began[0]:
            self._run_began = now, self._status.run_share

    def end_epoch(self, line: dict[str, Any]) -> None:
        """Print a line for the epoch; where nothing is live, one in some seconds."""
        now = time.monotonic()
        if self._live is None and now - self._printed < _LINE_SECONDS:
            return
        self._printed = now
        validation = "" if line["val_loss"] is None else f", validation {line['val_loss']:.4g}"
        loss = "-" if line["train_loss"] is None else f"{line['train_loss']:.4g}"
        accuracy = "" if line["val_accuracy"] is None else f", accuracy {line['val_accuracy']:.1%}"
        waited = {kind: share for kind, share in line["waiting"].items() if share >= _WAITED}
        self.message(
            f"{self._title}, epoch {line['epoch']}: loss {loss}{validation}{accuracy}, {line['samples_per_second']:.0f} samples/s, "
            f"peak {format_bytes(line['peak_bytes'])}{'; ' + describe_stalls(waited) if waited else ''}"
        )

    def message(self, text: str) -> None:
        """Print a message, on a terminal or elsewhere."""
        # Where lines are live, others are broken between words here; elsewhere a line stays one, for whoever reads it.
        fitted = wrapped(text, None if self._live is None else self._console.width, "  ")
        self._console.print(fitted, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def close(self) -> None:
        """Remove the live lines."""
        if self._live is not None:
            self._live.stop()

    def _begin_live(self) -> None:
        """Show what is live from now on; where that is so already, or nothing is, do nothing."""
        if self._live is not None:
            self._live.start()

    def _render(self) -> Text:
        """Return what is live now; called by a thread of its own."""
        # Read once: the training goes on meanwhile.
        stage, status, now = self._stage, self._status, time.monotonic()
        width = self._console.width
        if stage is not None:
            return Text(f"{stage[0]} ... {clock_text(now - stage[1])}"[:width], style="dim")
        if status is None:
            return Text("")
        began, before = self._epoch_began
        lasted = self._looked - began
        rate = (status.num_samples - before) / lasted if lasted > 0 and status.num_samples > before else None
        partition = _seconds_left(self._visit_began, status.visit_share, self._looked)
        run = _seconds_left(self._run_began, status.run_share, self._looked)
        if partition is not None and run is not None and run <= 1.02 * partition + 1:
            partition = None  # the last one, or the only one: one time says it all
        letters = {} if "utf" in self._console.encoding.lower() else {"letters": "#-#.|"}
        lines = live_lines(status, self._title, self._epoch, rate=rate, seconds_left=(partition, run), width=width, **letters)
        return Text("\n".join(lines), no_wrap=True, overflow="crop")


def _seconds_left(began: tuple[float, float], share: float, now: float) -> float | None:
    """Return the seconds until all is done, from how far it has come since it began here; None where that says nothing yet."""
    since, before = began
    if not since or share - before <= 0 or now - since < 1:
        return None
    return (1 - share) / (share - before) * (now - since)

"""Progress display: a live line on a terminal, elsewhere messages alone; it falls silent where it cannot be written."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lowmem_pnn.engine.stalls import describe_stalls
from lowmem_pnn.reporting.streams import UnbreakableStream
from lowmem_pnn.units import format_bytes


class Display:
    """Receiver of a run's events that shows nothing; the base of every display."""

    def enter(self, title: str) -> None:
        """Take note that a partition is being loaded onto the device."""

    def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
        """Take note that an epoch begins, or goes on after `done` samples."""

    def start_emit(self, title: str, split: str, num_samples: int) -> None:
        """Take note that the outputs of a partition are being written."""

    def advance(self, num_samples: int, used_bytes: int, budget_bytes: int) -> None:
        """Take note that `num_samples` samples of the epoch are done."""

    def end_epoch(self, line: dict[str, Any]) -> None:
        """Take note that an epoch ended; `line` is its line of `metrics.jsonl`."""

    def message(self, text: str) -> None:
        """Tell people something."""

    def close(self) -> None:
        """Take note that the run ended."""


class TerminalDisplay(Display):
    """Display with a live progress line on a terminal and a line per finished epoch; elsewhere messages alone.

    Args:
        console: Console on standard error.
    """

    def __init__(self, console: Console) -> None:
        # A console that cannot write would raise, in its own thread too, or end the process.
        console.file = UnbreakableStream(console.file)  # type: ignore[assignment,arg-type]
        self._console = console
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""
        if console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._live.start()

    def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
        """Show a progress bar for the epoch."""
        self._title = title
        self._start_bar(f"{title}, epoch {epoch + 1} of {epochs}", num_samples, done)

    def start_emit(self, title: str, split: str, num_samples: int) -> None:
        """Show that the outputs of a partition are being written."""
        self._start_bar(f"{title}, writing its outputs ({split})", None, 0)

    def advance(self, num_samples: int, used_bytes: int, budget_bytes: int) -> None:
        """Advance the progress bar."""
        if self._live is not None and self._task is not None:
            task = self._live.tasks[0]
            speed = f"{task.speed:.0f} samples/s" if task.speed else ""
            memory = f"{format_bytes(used_bytes)} of {format_bytes(budget_bytes)}"
            self._live.update(self._task, completed=num_samples, note=f"{speed}  {memory}")

    def end_epoch(self, line: dict[str, Any]) -> None:
        """Print a line for the epoch, on a terminal."""
        if self._live is not None:
            validation = "" if line["val_loss"] is None else f", validation {line['val_loss']:.4g}"
            loss = "-" if line["train_loss"] is None else f"{line['train_loss']:.4g}"
            accuracy = "" if line["val_accuracy"] is None else f", accuracy {line['val_accuracy']:.1%}"
            self._console.print(
                f"{self._title}, epoch {line['epoch']}: loss {loss}{validation}{accuracy}, "
                f"{line['samples_per_second']:.0f} samples/s, peak {format_bytes(line['peak_bytes'])}; "
                f"{describe_stalls(line['waiting'])}",
                highlight=False,
            )

    def message(self, text: str) -> None:
        """Print a message, on a terminal or elsewhere."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the progress bar."""
        if self._live is not None:
            self._live.stop()

    def _start_bar(self, description: str, total: int | None, done: int) -> None:
        if self._live is None:
            return
        if self._task is not None:
            self._live.remove_task(self._task)
        self._task = self._live.add_task(description, total=total, completed=done, note="")

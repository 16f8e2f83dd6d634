"""Progress for people: what a run tells while it works. On a terminal a live line; elsewhere nothing but messages."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lowmem_pnn.engine.stalls import in_words
from lowmem_pnn.units import format_bytes


class Display:
    """Takes the events of a run and shows nothing."""

    def enter(self, title: str) -> None:
        """A partition comes onto the device."""

    def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
        """An epoch begins, `done` samples into it."""

    def start_emit(self, title: str, split: str, num_samples: int) -> None:
        """A partition's outputs are being written."""

    def advance(self, num_samples: int, used_bytes: int, budget_bytes: int) -> None:
        """So many samples of the epoch are done."""

    def end_epoch(self, line: dict[str, Any]) -> None:
        """An epoch ended; `line` is its line of `metrics.jsonl`."""

    def message(self, text: str) -> None:
        """Something that a person should know."""

    def close(self) -> None:
        """The run ended."""


class TerminalDisplay(Display):
    """A live progress line on a terminal, one finished line per epoch; elsewhere only messages.

    Args:
        console: writes to standard error.
    """

    def __init__(self, console: Console) -> None:
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
        """Show a bar for the epoch."""
        self._title = title
        self._start(f"{title}, epoch {epoch + 1} of {epochs}", num_samples, done)

    def start_emit(self, title: str, split: str, num_samples: int) -> None:
        """Show that activations are written."""
        self._start(f"{title}, writing its outputs ({split})", None, 0)

    def advance(self, num_samples: int, used_bytes: int, budget_bytes: int) -> None:
        """Move the bar."""
        if self._live is not None and self._task is not None:
            task = self._live.tasks[0]
            speed = f"{task.speed:.0f} samples/s" if task.speed else ""
            memory = f"{format_bytes(used_bytes)} of {format_bytes(budget_bytes)}"
            self._live.update(self._task, completed=num_samples, note=f"{speed}  {memory}")

    def end_epoch(self, line: dict[str, Any]) -> None:
        """Leave a line behind on a terminal."""
        if self._live is not None:
            validation = "" if line["val_loss"] is None else f", validation {line['val_loss']:.4g}"
            accuracy = "" if line["val_accuracy"] is None else f", accuracy {line['val_accuracy']:.1%}"
            self._console.print(
                f"{self._title}, epoch {line['epoch']}: loss {line['train_loss']:.4g}{validation}{accuracy}, "
                f"{line['samples_per_second']:.0f} samples/s, peak {format_bytes(line['peak_bytes'])}; "
                f"{in_words(line['waiting'])}",
                highlight=False,
            )

    def message(self, text: str) -> None:
        """Print it, on a terminal or not."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._live is not None:
            self._live.stop()

    def _start(self, description: str, total: int | None, done: int) -> None:
        if self._live is None:
            return
        if self._task is not None:
            self._live.remove_task(self._task)
        self._task = self._live.add_task(description, total=total, completed=done, note="")

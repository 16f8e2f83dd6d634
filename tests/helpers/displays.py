"""Displays that stop runs, what a run tells a display, and streams that it shows that on."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

from lowmem_pnn.errors import Stopped
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.run_status import RunStatus


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


class Tee:
    """A stream as scripts put in the place of another: it has `write` and `flush` alone."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


class StopsAt(Display):
    """Stops a run when it tells something for the `at`th time."""

    def __init__(self, at: int | None = None) -> None:
        self.count, self._at = 0, at

    def _tell(self) -> None:
        self.count += 1
        if self.count == self._at:
            raise Stopped("enough")

    def enter(self, title: str) -> None:
        self._tell()

    def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
        self._tell()

    def advance(self, status: Callable[[], RunStatus]) -> None:
        self._tell()

    def end_epoch(self, line: dict[str, Any]) -> None:
        self._tell()


class Messages(Display):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


class Told(Display):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.messages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def message(self, text: str) -> None:
        self.messages.append(text)


LINE: dict[str, Any] = {
    "epoch": 1, "train_loss": 0.25, "val_loss": 0.5, "val_accuracy": 0.75, "samples_per_second": 1234.0, "peak_bytes": 42_000_000,
    "waiting": {"disk": 0.12, "copy": 0.0, "data": 0.03},
}  # fmt: skip


def status(done: int) -> RunStatus:
    """Return the status of a run of two partitions with 100 samples, three epochs each, in the first epoch."""
    return RunStatus(
        num_samples=done, loss=0.25, used_bytes=10_000_000, budget_bytes=100_000_000, written_bytes=1_000_000,
        visit_share=done / 300, run_share=done / 600,
    )  # fmt: skip


def tell(display: Display) -> None:
    display.stage("planning")
    display.header(["model: mlp:64-32-10", "budget: 100.0 MB"])
    display.enter("partition 1 of 2 (0 to 2)")
    display.start_epoch("partition 1 of 2 (0 to 2)", 0, 3, 100, 0)
    for done in (50, 100):
        display.advance(partial(status, done))
    display.end_epoch(LINE)
    display.start_emit("partition 1 of 2 (0 to 2)", "train", 100)
    display.advance(partial(status, 100))
    display.message("going on with a micro-batch of 8")
    display.close()

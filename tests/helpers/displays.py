"""Displays that stop runs."""

from typing import Any

from lowmem_pnn.errors import Stopped
from lowmem_pnn.reporting.progress import Display


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

    def advance(self, num_samples: int, used_bytes: int, budget_bytes: int) -> None:
        self._tell()

    def end_epoch(self, line: dict[str, Any]) -> None:
        self._tell()

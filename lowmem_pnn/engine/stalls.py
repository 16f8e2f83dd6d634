"""Stalls: how long computing waited for something, and for what.

    disk   weights, optimizer state and boundary activations that were not read yet, or for which there was no room to be written
    copy   samples on their way to the device, results on their way from it
    data   samples of the data set that were not read yet, or made ready

What goes on behind the computing costs nothing and is not counted.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar

Kind = Literal["disk", "copy", "data"]
KINDS: tuple[Kind, ...] = ("disk", "copy", "data")

_T = TypeVar("_T")


class Stalls:
    """Adds up seconds by kind, on the thread that computes."""

    def __init__(self) -> None:
        self._seconds: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        self._is_waiting = False

    @contextmanager
    def waiting(self, kind: Kind) -> Iterator[None]:
        """What is done inside is waited for; inside of another wait it is part of that.

        Args:
            kind: what for.
        """
        if self._is_waiting:
            yield
            return
        self._is_waiting = True
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[kind] += time.perf_counter() - began
            self._is_waiting = False

    def over(self, kind: Kind, items: Iterable[_T]) -> Iterator[_T]:
        """Iterate, waiting for each item.

        Args:
            kind: what for.
            items: what comes.
        """
        iterator = iter(items)
        while True:
            with self.waiting(kind):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
            del item  # or two would be there while the next one is waited for

    def seconds(self) -> dict[str, float]:
        """Totals so far, by kind."""
        return {str(kind): seconds for kind, seconds in self._seconds.items()}


def shares(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> dict[str, float]:
    """What part of some time was spent waiting, by kind.

    Args:
        before: totals at its begin.
        after: totals at its end.
        seconds: that it took.

    Example:
        >>> shares({"disk": 1.0}, {"disk": 1.5}, 10.0)
        {'disk': 0.05}
    """
    return {kind: (total - before[kind]) / max(seconds, 1e-9) for kind, total in after.items()}


def in_words(waiting: Mapping[str, float]) -> str:
    """Shares for people.

    Example:
        >>> in_words({"disk": 0.012, "copy": 0.0, "data": 0.03})
        'waiting for: disk 1 %, copy 0 %, data 3 %'
    """
    return "waiting for: " + ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in waiting.items())

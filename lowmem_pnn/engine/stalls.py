"""Stalls: the seconds for which the computing thread waits for the drive, for a copy, or for data.

    disk   weights, optimizer state and boundary activations that were not read yet, or for which there was no room to be written
    copy   samples on their way to the device, results on their way from it
    data   samples of the dataset that were not read or prepared yet

Work in the background that the computing thread does not wait for costs nothing, and is not counted.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar

StallKind = Literal["disk", "copy", "data"]
STALL_KINDS: tuple[StallKind, ...] = ("disk", "copy", "data")

_T = TypeVar("_T")


class Stalls:
    """Counter of the seconds that the computing thread waits, by kind."""

    def __init__(self) -> None:
        self._seconds: dict[StallKind, float] = dict.fromkeys(STALL_KINDS, 0.0)
        self._is_waiting = False

    @contextmanager
    def waiting(self, kind: StallKind) -> Iterator[None]:
        """Count the time inside the context as a wait; a wait inside another wait is part of the outer one.

        Args:
            kind: kind of stall.
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

    def iterate(self, kind: StallKind, items: Iterable[_T]) -> Iterator[_T]:
        """Iterate over items, counting the time spent waiting for each.

        Args:
            kind: kind of stall.
            items: iterable that makes an item when it is asked for it.
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
        """Return the seconds of waiting so far, by kind."""
        return {str(kind): seconds for kind, seconds in self._seconds.items()}


def stall_shares(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Return the share of a period that was spent waiting, by kind.

    Args:
        before: seconds of waiting at the beginning of the period, by kind.
        after: seconds of waiting at its end, by kind.
        seconds: length of the period.

    Example:
        >>> stall_shares({"disk": 1.0}, {"disk": 1.5}, 10.0)
        {'disk': 0.05}
    """
    return {kind: (total - before[kind]) / max(seconds, 1e-9) for kind, total in after.items()}


def describe_stalls(shares: Mapping[str, float]) -> str:
    """Say in words which share of a period was spent waiting.

    Args:
        shares: shares of the period, 0 to 1, by kind.

    Example:
        >>> describe_stalls({"disk": 0.012, "copy": 0.0, "data": 0.03})
        'waiting for: disk 1 %, copy 0 %, data 3 %'
    """
    return "waiting for: " + ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items())

"""Progress of what is done before a run has a display: texts, told to whoever listens."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SECONDS_BETWEEN = 5.0

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


@contextmanager
def telling(listener: Callable[[str], None]) -> Iterator[None]:
    """Have a function called with the texts that are told inside.

    Args:
        listener: Takes one line.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(text: str) -> None:
    """Tell a text to whoever listens; without anybody it is dropped.

    Args:
        text: One line.
    """
    if (listener := _listener.get()) is not None:
        listener(text)


class Ticker:
    """Says now and then that something goes on."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether some seconds have passed since it was due before."""
        if (now := time.monotonic()) - self._last < _SECONDS_BETWEEN:
            return False
        self._last = now
        return True

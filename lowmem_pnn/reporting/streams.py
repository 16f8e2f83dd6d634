"""Output streams that may break: progress that cannot be written is left out, and ends nothing.

A terminal goes with its window, a log's disk fills up, a pipe's reader leaves. Training goes on.
"""

import io
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO


class UnbreakableStream(io.TextIOBase):
    """Stream of texts that falls silent when it cannot be written to.

    Args:
        stream: stream that the texts go to; None where the process has none.

    Example:
        >>> stream = UnbreakableStream(None)
        >>> stream.write("progress"), stream.is_silent
        (8, True)
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.is_silent = stream is None

    def write(self, text: str) -> int:
        """Write a text, if that is possible; return its length. Letters that the stream has no bytes for are written as their numbers."""
        self._try(lambda stream: self._write(stream, text))
        return len(text)

    def flush(self) -> None:
        """Bring what was written to its place, if that is possible."""
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return is_terminal(self._stream)

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        if self._stream is None or not hasattr(self._stream, "fileno"):
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        """Return True: whatever comes of it, it can be written to."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:  # as of the name of a file that is no text
            stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))

    def _try(self, work: Callable[[TextIO], object]) -> None:
        if self.is_silent or self._stream is None:
            return
        try:
            work(self._stream)
        except (OSError, ValueError):  # ValueError: the stream was closed
            self.is_silent = True
            drop(self._stream)


def is_terminal(stream: Any) -> bool:
    """Decide whether a stream is a terminal.

    Args:
        stream: anything that texts are written to, which need not have `isatty`; None where the process has none.

    Example:
        >>> is_terminal(None), is_terminal(io.StringIO())
        (False, False)
    """
    with suppress(ValueError):  # it was closed
        return hasattr(stream, "isatty") and bool(stream.isatty())
    return False


def drop(stream: TextIO) -> None:
    """Send what a broken stream still holds, and all that will come, to nowhere: else Python would fail once more at its end.

    Args:
        stream: stream that cannot be written to.
    """
    with suppress(OSError, ValueError, AttributeError):  # AttributeError: a stream of somebody's own has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)

"""The outside meter: polls the private memory of another process, or of its worker, without its knowledge."""

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.005
_PRIVATE = re.compile(rb"Rss(?:Anon|Shmem):\s+(\d+) kB")


class OutsideMeter:
    """Polls the private memory (RssAnon + RssShmem) of a process every 5 ms, until it is stopped (Linux).

    Args:
        pid: the process.
        has_begun: says whether what is to be measured goes on by now: what was in use before is not looked at.
        of_child: whether the process is a supervisor, whose youngest child does the work.

    Example:
        >>> import os
        >>> meter = OutsideMeter(os.getpid())
        >>> meter.start(), time.sleep(0.05), meter.stop()
        (None, None, None)
        >>> meter.peak_bytes > 1_000_000
        True
    """

    def __init__(self, pid: int, has_begun: Callable[[], bool] = lambda: True, *, of_child: bool = False) -> None:
        self._pid, self._has_begun, self._of_child = pid, has_begun, of_child
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0

    def start(self) -> None:
        """Begin to poll."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, after a last look."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        watched, begun, looked = self._pid, False, 0.0
        while not self._over.wait(POLL_SECONDS):
            now = time.monotonic()
            if self._of_child and now - looked > 0.1:
                watched, looked = _youngest_child(self._pid) or self._pid, now
            begun = begun or self._has_begun()
            if begun:
                self.peak_bytes = max(self.peak_bytes, private_bytes_of(watched))


def private_bytes_of(pid: int) -> int:
    """Return the private memory of a process; 0 where it is gone.

    Args:
        pid: the process.
    """
    with suppress(OSError):
        return sum(map(int, _PRIVATE.findall(Path(f"/proc/{pid}/status").read_bytes()))) * 1024
    return 0


def _youngest_child(pid: int) -> int | None:
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[-1]) if children else None
    return None

"""Context memory: the bytes that this process holds on a GPU outside PyTorch's allocator, and how they were found.

A context holds some 300 to 600 MB: its own tables, kernels, libraries. Where the driver lists processes with their bytes, that figure
less the allocator's is it. But some drivers list the process with no bytes (containers), or under the host's process id, or have no list
(MIG, Jetson); then what the device holds more of, once the context is there, is it. And that shows nothing where the context was there
before, as in the second run of a notebook: so the figure is remembered for as long as the process lives, which a context does too.

    nvml         the driver's figure of this process
    difference   what the device held more after the start than before it
    assumed      neither can be believed, or less than any context holds: a figure on the safe side
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from lowmem_pnn.device.cuda_driver import CudaDriver

How = Literal["nvml", "difference", "assumed"]

LEAST_BYTES = 250_000_000
"""What is believed at least, for want of a context that is known to hold less."""
ASSUMED_BYTES = 600_000_000
"""What is assumed where nothing was found."""

# A difference above this is the memory of somebody else who came at the same time.
_MOST_BYTES = 2_000_000_000
# Looking asks the driver, which takes a millisecond, in every batch.
_SECONDS_BETWEEN = 1.0


@dataclass(frozen=True)
class _Found:
    size: int
    how: How
    pid: int | None


_remembered: dict[str, _Found] = {}
"""What was found of this process's contexts, by device."""


class ContextMemory:
    """Finds the context's memory, and looks again later: kernels and libraries are loaded at their first use.

    Args:
        driver: driver of the machine.
        clock: clock in seconds, for how often to look.
    """

    def __init__(self, driver: CudaDriver, clock: Callable[[], float] = time.monotonic) -> None:
        self._driver, self._clock = driver, clock
        self._found = _Found(0, "assumed", None)
        self._looked = clock()

    @property
    def size(self) -> int:
        """Bytes that the process holds on the device outside the allocator."""
        return self._found.size

    @property
    def how(self) -> How:
        """How they were found."""
        return self._found.how

    def start(self) -> None:
        """Have the driver create the context, and find what it holds."""
        driver = self._driver
        existed, listed = driver.has_context(), driver.processes() or {}
        used = None if existed or driver.is_unified() else driver.device_used()
        driver.start()
        before, now = _remembered.get(driver.identity()), driver.processes() or {}
        pid = _own_id(set(now) - set(listed), now if existed else {}, before)
        self._found = self._listed(now, pid) or self._difference(used, pid) or _Found(ASSUMED_BYTES, "assumed", pid)
        # What was found once stays: nothing that a context has loaded goes before the process does.
        if before is not None and (self._found.how == "assumed" or (before.size > self._found.size and before.how != "assumed")):
            self._found = _Found(before.size, before.how, pid or before.pid)
        self._remember()

    def look_again(self, *, now: bool = False) -> None:
        """Ask the driver again, at most once a second; only where it knows the process: other memory may be another process's.

        Args:
            now: whether to ask however short ago that was.
        """
        if self._found.pid is None or (not now and self._clock() - self._looked < _SECONDS_BETWEEN):
            return
        self._looked = self._clock()
        found = self._listed(self._driver.processes() or {}, self._found.pid)
        if found is not None and found.size > self._found.size:
            self._found = found
            self._remember()

    def _remember(self) -> None:
        _remembered[self._driver.identity()] = self._found

    def _listed(self, processes: Mapping[int, int | None], pid: int | None) -> _Found | None:
        """Return the driver's figure; None where it has none, or one that is less than the allocator alone holds."""
        figure = None if pid is None else processes.get(pid)
        if figure is None or figure <= (reserved := self._driver.reserved()):
            return None
        size = figure - reserved
        return _Found(max(size, LEAST_BYTES), "nvml" if size >= LEAST_BYTES else "assumed", pid)

    def _difference(self, used: int | None, pid: int | None) -> _Found | None:
        """Return what the device holds more than before; None where that was not known, or cannot be a context."""
        after = self._driver.device_used()
        if used is None or after is None:
            return None
        size = after - used - self._driver.reserved()
        if size > _MOST_BYTES:
            return None
        return _Found(max(size, LEAST_BYTES), "difference" if size >= LEAST_BYTES else "assumed", pid)


def _own_id(new: set[int], listed: Mapping[int, int | None], before: _Found | None) -> int | None:
    """Return the id under which the driver lists this process.

    Args:
        new: ids that were not listed before the context was there: one of them is ours, whatever our own id is.
        listed: ids that are listed, where the context was there before.
        before: what is remembered of this process.
    """
    own = os.getpid()
    if own in new:
        return own
    if len(new) == 1:
        return next(iter(new))
    if before is not None and before.pid in listed:
        return before.pid
    return own if own in listed else None

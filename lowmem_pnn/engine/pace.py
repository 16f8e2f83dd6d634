"""Pace: notices that steps become several times slower, where a full device moves memory to the host instead of refusing it."""

import statistics
import time
from collections import deque
from collections.abc import Callable

# Steps that a run's own pace is taken from, after one that loads kernels; steps that are compared with it; how many times as slow they are.
_FIRST, _LAST, _TIMES = 10, 5, 4.0


class Pace:
    """Watches the seconds between steps, and speaks once.

    Windows, WSL and devices with the host's memory do not fail where others take the memory that a run counts on: the driver moves some
    of it, and every step waits for it. What the run's first steps took is what it is held against; validation and commits, which come
    now and then, are no pace.

    Args:
        tell: is given what is said.
        clock: clock in seconds.
    """

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell: Callable[[str], None] | None = tell
        self._clock = clock
        self._before: float | None = None
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=_LAST)

    def step(self) -> None:
        """Note that a step is done."""
        if self._tell is None:
            return
        now = self._clock()
        before, self._before = self._before, now
        if before is None:
            return
        if len(self._first) < _FIRST:
            self._first.append(now - before)
            return
        self._last.append(now - before)
        usual, recent = statistics.median(self._first), statistics.median(self._last)
        if len(self._last) == _LAST and recent > _TIMES * usual:
            tell, self._tell = self._tell, None
            tell(
                f"steps take {recent:.3g} s, and took {usual:.3g} at first: the driver may have moved the device's memory to the host, for "
                "want of room; end other programs that use the GPU, or give a smaller --max-gpu-mem"
            )

"""The process: what one process that trains was started with."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.run.callbacks import Callback
from lowmem_pnn.run.ranks import ALONE, Rank


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process that trains: who looks on, which of several it is, and how the one before it ended.

    Args:
        display: is told of the run's progress.
        should_stop: asked after every batch.
        callbacks: are told of steps, epochs and commits.
        rank: which of several processes this is.
        after_crash: whether the process before died at the memory limit: the micro-batch that was in use is then halved.
        seconds_spent: seconds that processes which died have spent of the time limit.
    """

    display: Display = field(default_factory=Display)
    should_stop: Callable[[], bool] = lambda: False
    callbacks: Sequence[Callback] = ()
    rank: Rank = ALONE
    after_crash: bool = False
    seconds_spent: float = 0.0

    def stop_or_limit(self, config: FitConfig) -> Callable[[], bool]:
        """Return what says that a run is to stop: it was asked to, or its time is over.

        Args:
            config: options of the run; the rest of its time limit begins now.
        """
        if config.time_limit is None:
            return self.should_stop
        end = time.monotonic() + config.time_limit - self.seconds_spent
        return lambda: self.should_stop() or time.monotonic() >= end


UNWATCHED = Process()
"""The only process, which nobody watches and nobody stops."""

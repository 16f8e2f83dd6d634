"""The session: what one process works with while a run goes on in it, and what the process was started with."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.device import Device
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.run.callbacks import Callback, Callbacks
from lowmem_pnn.run.ranks import ALONE, Rank
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.run_directory import RunDirectory


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


@dataclass(frozen=True)
class Session:
    """What one process works with while a run goes on in it; a resume begins another.

    Args:
        device: open training device.
        rundir: the run's directory, locked by this process.
        threads: background threads that read, write and sync.
        display: is told of the run's progress.
        should_stop: asked after every batch; when it says so the run commits and raises `Stopped`.
        callbacks: are told of steps, epochs and commits.
        counter: counter of all bytes read and written.
        began: monotonic time at which the process began with the run, in seconds.
        after_crash: whether the process before died at the memory limit.
        scratch: folder for activations, where a run that is done is measured again; None for the run's own.
    """

    device: Device
    rundir: RunDirectory
    threads: WorkerThreads
    display: Display = field(default_factory=Display)
    should_stop: Callable[[], bool] = lambda: False
    callbacks: Callbacks = field(default_factory=Callbacks)
    counter: IoCounter = field(default_factory=IoCounter)
    began: float = field(default_factory=time.monotonic)
    after_crash: bool = False
    scratch: Path | None = None

    @property
    def folder(self) -> Path:
        """Folder in which activations are written."""
        return self.scratch or self.rundir.path

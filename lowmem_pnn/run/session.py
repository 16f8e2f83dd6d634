"""The session: what one process works with while a run goes on in it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lowmem_pnn.device import Device
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.run.callbacks import Callbacks
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.run_directory import RunDirectory


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

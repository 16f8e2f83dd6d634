"""The only run: a process has one run at a time, and one on a GPU, since what they measure and draw would be of all of them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lowmem_pnn.device import CudaDevice, Device
from lowmem_pnn.errors import BusyError

# Held by the thread that has a run.
_RUN = threading.RLock()
# GPUs that the runs of that thread have open.
_OPEN_GPUS: list[Device] = []


@contextmanager
def only_run() -> Iterator[None]:
    """Keep other threads of this process from beginning a run inside the context: memory is metered, and random numbers are drawn, for all
    threads at once, so that two runs would change each other. The same thread may begin another one, as a callback does that predicts; see
    `alone_on_gpus`.

    Raises:
        BusyError: another thread has a run.
    """
    if not _RUN.acquire(blocking=False):
        raise BusyError(
            "another thread of this process trains, or uses, a run, and memory is measured for both together: do one after the other, or each "
            "in a process of its own"
        )
    try:
        yield
    finally:
        _RUN.release()


@contextmanager
def alone_on_gpus(device: Device) -> Iterator[None]:
    """Keep a run inside of another one, as a callback begins it, from a GPU where the other has one: the cap and the peak of PyTorch's
    allocator are those of the run that was opened last, and are gone when it closes.

    Args:
        device: training device of the run, not open yet.

    Raises:
        BusyError: this thread has a run on a GPU already, and this one would be on a GPU too.
    """
    if not isinstance(device, CudaDevice):
        yield
        return
    if _OPEN_GPUS:
        raise BusyError(
            "this thread has a run on a GPU, whose budget another one inside of it, as of a callback, would lift: begin it when that has ended, "
            "in a process of its own, or with --device cpu"
        )
    _OPEN_GPUS.append(device)
    try:
        yield
    finally:
        _OPEN_GPUS.remove(device)

"""Meter of the private memory of this process: reads its size from the operating system, and samples its peak in a thread."""

import contextlib
import io
import mmap
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_PRIVATE = re.compile(rb"Rss(?:Anon|Shmem):\s+(\d+) kB")
_SHARED = re.compile(rb"RssShmem:\s+(\d+) kB")
_DATA = re.compile(rb"VmData:\s+(\d+) kB")
_STACK = re.compile(rb"VmStk:\s+(\d+) kB")


def private_and_data_bytes() -> tuple[int, int]:
    """Read how much memory without a file behind it the process holds, and the size of its private writable mappings, touched or not.

    Returns:
        RssAnon + RssShmem and VmData on Linux; elsewhere the unique set size and 0.
    """
    try:
        status = _STATUS.read_bytes()
    except OSError:
        info = psutil.Process().memory_full_info()
        return int(getattr(info, "uss", info.rss)), 0
    return _total(_PRIVATE, status), _total(_DATA, status)


def _total(names: re.Pattern[bytes], status: bytes) -> int:
    """Return the sum of some lines of `status`, in bytes."""
    return sum(map(int, names.findall(status))) * 1024


def private_bytes() -> int:
    """Read how much memory without a file behind it the process holds."""
    return private_and_data_bytes()[0]


class MemoryReader:
    """Reads `private_and_data_bytes` again and again, as cheaply as the system allows; one thread uses it.

    Linux's `statm` is read and parsed ten times faster than `status`. But it counts shared memory with files, and the stack with
    data, so these two are taken from `status` now and then; and its counts may lag by some pages for each core.
    """

    # Samples from one reading of `status` to the next.
    _STATUS_INTERVAL = 64

    def __init__(self) -> None:
        self._num_samples = 0
        self._shared_bytes = self._stack_bytes = 0
        self._statm: io.FileIO | None = None
        with contextlib.suppress(OSError):
            self._statm = io.FileIO("/proc/self/statm")

    def read(self) -> tuple[int, int]:
        """Read the two sizes of `private_and_data_bytes`."""
        if self._statm is None:
            return private_and_data_bytes()
        if self._num_samples % self._STATUS_INTERVAL == 0:
            status = _STATUS.read_bytes()
            # Not the differences between the two files: memory that is freed between their readings would be counted from then on.
            self._shared_bytes, self._stack_bytes = _total(_SHARED, status), _total(_STACK, status)
            private, data = _total(_PRIVATE, status), _total(_DATA, status)
        else:
            anonymous, data_and_stack = self._read_statm()
            private, data = anonymous + self._shared_bytes, data_and_stack - self._stack_bytes
        self._num_samples += 1
        return private, data

    def close(self) -> None:
        """Close `statm`."""
        if self._statm is not None:
            self._statm.close()

    def _read_statm(self) -> tuple[int, int]:
        assert self._statm is not None
        _, resident, shared, _, _, data, _ = map(int, os.pread(self._statm.fileno(), 256, 0).split())
        return (resident - shared) * mmap.PAGESIZE, data * mmap.PAGESIZE


class ProcessMemoryMeter:
    """A thread that samples `private_bytes` and keeps the highest sample of the present section.

    Args:
        interval: seconds between samples. Large blocks are held far longer than 2 ms.
        on_sample: function that the thread calls with each sample (private bytes, mapped bytes).
    """

    def __init__(self, interval: float = 0.002, on_sample: Callable[[int, int], object] = lambda private, data: None) -> None:
        self._interval = interval
        self._on_sample = on_sample
        self._highest = 0
        self._lock = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._sample, name="lowmem-meter", daemon=True)

    def start(self) -> None:
        """Start sampling."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling; the peak stays readable."""
        self._stopped = True
        if self._thread.is_alive():
            self._thread.join()

    def begin_section(self) -> None:
        """Forget the highest sample so far."""
        with self._lock:
            self._highest = private_bytes()

    def peak(self) -> int:
        """Return the highest sample of the section, in bytes; takes one more now."""
        self._take_sample(private_and_data_bytes)
        return self._highest

    def _take_sample(self, read: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        # Locked from the reading on: a sample from before a section must not be counted in it.
        with self._lock:
            private, data = read()
            self._highest = max(self._highest, private)
            return private, data

    def _sample(self) -> None:
        reader = MemoryReader()
        # Not an event that is waited for: making its lock costs more than the sample.
        while not self._stopped:
            time.sleep(self._interval)
            # Near the memory limit even this may find no memory; the next sample may.
            with contextlib.suppress(MemoryError, OSError):
                self._on_sample(*self._take_sample(reader.read))
        reader.close()

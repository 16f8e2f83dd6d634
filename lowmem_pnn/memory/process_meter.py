"""Private memory of this process: reading it, sampling its peak, and bounding it by the operating system."""

import contextlib
import ctypes
import io
import mmap
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import psutil

from lowmem_pnn.units import MEBIBYTE

_STATUS = Path("/proc/self/status")
_PRIVATE = re.compile(rb"Rss(?:Anon|Shmem):\s+(\d+) kB")
_DATA = re.compile(rb"VmData:\s+(\d+) kB")

# glibc's names for mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


class MemoryReader:
    """Reads `private_and_data_bytes` again and again, as cheaply as the system allows; one thread uses it.

    Linux's `statm` is read and taken apart ten times faster than `status`. But it counts shared memory with files, and the stack with
    data, so these two are taken from `status` now and then; and its counts may be behind by some pages for each core.
    """

    _EVERY = 64

    def __init__(self) -> None:
        self._count = 0
        self._shared_bytes = self._stack_bytes = 0
        self._file: io.FileIO | None = None
        with contextlib.suppress(OSError):
            self._file = io.FileIO("/proc/self/statm")

    def read(self) -> tuple[int, int]:
        """See `private_and_data_bytes`."""
        if self._file is None or self._count % self._EVERY == 0:
            private, data = private_and_data_bytes()
            if self._file is not None:
                anonymous, data_and_stack = self._read()
                # Less than nothing where the counts are behind.
                self._shared_bytes, self._stack_bytes = max(0, private - anonymous), max(0, data_and_stack - data)
        else:
            anonymous, data_and_stack = self._read()
            private, data = anonymous + self._shared_bytes, data_and_stack - self._stack_bytes
        self._count += 1
        return private, data

    def close(self) -> None:
        """Close the file that is read."""
        if self._file is not None:
            self._file.close()

    def _read(self) -> tuple[int, int]:
        assert self._file is not None
        _, resident, shared, _, _, data, _ = map(int, os.pread(self._file.fileno(), 256, 0).split())
        return (resident - shared) * mmap.PAGESIZE, data * mmap.PAGESIZE


def private_and_data_bytes() -> tuple[int, int]:
    """What the process holds that is not a file, and the size of its private writable mappings, touched or not.

    Returns:
        RssAnon + RssShmem and VmData on Linux; elsewhere the unique set size and 0.
    """
    try:
        status = _STATUS.read_bytes()
    except OSError:
        info = psutil.Process().memory_full_info()
        return int(getattr(info, "uss", info.rss)), 0
    data = _DATA.search(status)
    assert data is not None
    return sum(int(kilobytes) for kilobytes in _PRIVATE.findall(status)) * 1024, int(data[1]) * 1024


def private_bytes() -> int:
    """What the process holds that is not a file."""
    return private_and_data_bytes()[0]


def fix_malloc_thresholds(budget_bytes: int) -> None:
    """Make glibc give large freed blocks back at once.

    Left alone it raises its mmap threshold to the size of whatever is freed (up to 32 MiB), after which freed tensors stay in the heap
    and the peak is fragmentation. What is given back is zeroed, page by page, when it is used again, so that the thresholds grow with
    the budget. Elsewhere than on glibc this does nothing.

    Args:
        budget_bytes: blocks from a 64th of it on are given back (256 KiB to 8 MiB), and so is the heap's free end (1 to 8 MiB).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, min(max(budget_bytes // 64, MEBIBYTE // 4), 8 * MEBIBYTE))
        libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold(budget_bytes))


def trim_threshold(budget_bytes: int) -> int:
    """Bytes of the heap's free end that are kept."""
    return min(max(budget_bytes // 64, MEBIBYTE), 8 * MEBIBYTE)


def trim_heap() -> None:
    """Give the heap's free pages back to the system, those between used ones too (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class HeapRelief:
    """Gives the heap's free pages back while more is in use than there should be.

    Blocks from the heap are fast, since their pages stay. But where blocks of many sizes come and go (activations go while gradients
    come), the holes that they leave can be half as much again as what is in use. Below the level nothing is done.

    Args:
        level_bytes: private memory that is no reason to do anything.
    """

    _WORTHWHILE = MEBIBYTE
    _SHORTEST, _LONGEST = 0.004, 0.5

    def __init__(self, level_bytes: int) -> None:
        self.set_level(level_bytes)

    def set_level(self, level_bytes: int) -> None:
        """Change the level, at any time; what there was to give back before says nothing of what comes."""
        self._level_bytes = level_bytes
        self._pause, self._next = self._SHORTEST, 0.0

    def follow(self, private: int) -> None:
        """Look at a sample; called often.

        Args:
            private: bytes in use.
        """
        if private <= self._level_bytes or time.monotonic() < self._next:
            return
        trim_heap()
        # Where there was nothing to give back, what is in use is in use: asking on and on would only hold up who allocates.
        useless = private - private_bytes() < self._WORTHWHILE
        self._pause = min(2 * self._pause, self._LONGEST) if useless else self._SHORTEST
        self._next = time.monotonic() + self._pause


class DataLimit:
    """The wall: RLIMIT_DATA, so that the allocation which takes private memory past an allowance fails in this process.

    Linux counts mappings, touched or not. What is mapped and never touched (oneDNN keeps 256 KiB for each kernel that it compiles, and
    fills a tenth of it) would bring the wall nearer and nearer, so the limit follows: it stands where present mappings, with private
    memory grown to the allowance, would reach. One large mapping still fails at once. On other systems there is no wall, and the plan
    and the meter stand alone.

    Args:
        allowance_bytes: private memory above what there is when the wall is raised.
    """

    # Moving the limit for less would be a system call for nothing.
    _STEP = MEBIBYTE
    # What stays untouched for so many samples is left untouched; a block that is being filled is not, and is no reason to move.
    _SAMPLES = 20

    def __init__(self, allowance_bytes: int) -> None:
        self._allowance_bytes = allowance_bytes
        self._before: tuple[int, int] | None = None
        self._floor = 0
        self._wall = 0
        self._untouched: deque[int] = deque(maxlen=self._SAMPLES)

    def raise_wall(self) -> None:
        """Set the limit. A stricter one that is already set stays."""
        if not sys.platform.startswith("linux"):
            return
        import resource

        self._floor, data = private_and_data_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wall = data + self._allowance_bytes
        if soft != resource.RLIM_INFINITY and soft <= wall:
            return
        resource.setrlimit(resource.RLIMIT_DATA, (wall, hard))
        self._untouched.extend([data - self._floor] * self._SAMPLES)
        self._before, self._wall = (soft, hard), wall

    def follow(self, private: int, data: int) -> None:
        """Move the limit by what is mapped without being used; called often while the wall is up.

        Args:
            private: bytes in use.
            data: bytes mapped.
        """
        if self._before is None:
            return
        import resource

        soft, hard = self._before
        self._untouched.append(data - private)
        wall = min(self._untouched) + self._floor + self._allowance_bytes
        if soft != resource.RLIM_INFINITY:
            wall = min(wall, soft)
        if abs(wall - self._wall) >= self._STEP:
            resource.setrlimit(resource.RLIMIT_DATA, (wall, hard))
            self._wall = wall

    def take_down(self) -> None:
        """Put the limit back that was there before."""
        if self._before is not None:
            import resource

            before, self._before = self._before, None
            resource.setrlimit(resource.RLIMIT_DATA, before)


class ProcessMemoryMeter:
    """A thread that samples `private_bytes` and keeps the highest, per section and in all.

    Args:
        interval: seconds between samples. Large blocks are held far longer than 2 ms.
        on_sample: called with each sample (private bytes, mapped bytes), by the thread.
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
        """The highest sample of the section, in bytes; includes the present."""
        self._note(private_and_data_bytes)
        return self._highest

    def _note(self, read: Callable[[], tuple[int, int]]) -> tuple[int, int]:
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
            # Near the wall even this may find no memory; the next sample may.
            with contextlib.suppress(MemoryError, OSError):
                self._on_sample(*self._note(reader.read))
        reader.close()

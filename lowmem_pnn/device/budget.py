"""Enforcement of the memory budget: reserve, check of the measured peak, operating-system limit, out-of-memory errors.

The budget is kept in three steps, each for allocations that the step before it did not foresee:

    plan    partitions and micro-batches are chosen so that the predicted peak stays `reserve_bytes` below the budget
    check   after each step the measured peak is compared with the budget (`check_peak`); above it the step counts as out of memory
    limit   an allocation above the budget fails: by `DataLimit` on the CPU; on a GPU by the cap of PyTorch's allocator, which stands below
            the budget by the memory outside of the allocator, and by as much as the allocator may pass it (`cuda.py`)

`is_out_of_memory` recognises the failures of the last two; the executor then undoes the batch and halves the micro-batch.
"""

import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowmem_pnn.memory.process_meter import private_and_data_bytes
from lowmem_pnn.units import MEBIBYTE

# How libraries below us say that memory ran out without raising torch.OutOfMemoryError. oneDNN reports a failed allocation as a
# primitive that cannot be made; cuDNN finds no engine whose workspace fits, or fails within one; cuBLAS has no room for a handle; on
# Jetson the caching allocator's NVML query fails instead of the allocation. Some of them have other causes too: what was said goes into
# the error where nothing smaller helps.
_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "could not create a primitive",
    "could not create a memory object",
    "could not execute a primitive",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "GET was unable to find an engine",
    "FIND was unable to find an engine",
    "nable to find a valid cuDNN algorithm",
    "NVML_SUCCESS == r INTERNAL ASSERT",
)
# Those of them that have other causes too.
_AMBIGUOUS = re.compile(
    r"CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_(INTERNAL_ERROR|EXECUTION_FAILED)|nable to find a(n engine| valid cuDNN)"
)
# How oneDNN says that it has no kernel: of recurrent layers in bfloat16 and float16 on processors without instructions for these types.
# Other operations have kernels of PyTorch's own there.
_NO_KERNEL = re.compile(r"could not create a primitive descriptor for the .*(RNN|LSTM|GRU|AUGRU) ")


class OverBudget(MemoryError):
    """A measured peak above the budget: treated as running out of memory, before an allocation fails."""


def is_out_of_memory(error: BaseException) -> bool:
    """Decide whether an exception means that memory ran out.

    Args:
        error: an exception that a computation or an allocation raised.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return (
        isinstance(error, RuntimeError) and any(known in text for known in _OUT_OF_MEMORY_TEXTS) and not _NO_KERNEL.search(text)
    )


def other_cause(error: BaseException) -> str:
    """Return what a library said, in a line, where that may mean something else than that memory ran out; else nothing.

    Args:
        error: an exception that `is_out_of_memory` recognises.
    """
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, RuntimeError) and _AMBIGUOUS.search(str(error)) else ""


def why_it_failed(error: BaseException) -> str:
    """Say in one line why a model failed on the device, and what to do.

    Args:
        error: an exception that is not for want of memory.
    """
    if isinstance(error, RuntimeError) and (found := _NO_KERNEL.search(str(error))):
        return f"this processor has no kernel for its {found[1]} in the type that it computes in; give --precision fp32"
    reason = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {reason}; mend its forward"


def reserve_bytes_of(budget_bytes: int) -> int:
    """Return the part of a budget that plans keep free for unforeseen allocations: a thirty-second, at least 4 MiB."""
    return max(4 * MEBIBYTE, budget_bytes // 32)


def check_peak(peak_bytes: int, budget_bytes: int) -> None:
    """Refuse a measured peak above the budget.

    Raises:
        OverBudget: the peak is above the budget.

    Example:
        >>> check_peak(99, budget_bytes=100)
    """
    if peak_bytes > budget_bytes:
        raise OverBudget(f"{peak_bytes} bytes in use, above the budget of {budget_bytes}")


class DataLimit:
    """RLIMIT_DATA, set so that the allocation which takes private memory past an allowance fails in this process.

    Linux counts mappings, touched or not. Mappings that are never touched (oneDNN keeps 256 KiB for each kernel that it compiles, and
    fills a tenth of it) would leave less and less below a fixed limit, so the limit is adjusted: it stands where present mappings,
    with private memory grown to the allowance, would reach. One large mapping still fails at once. On other systems there is no
    limit, and the plan and the meter stand alone.
    """

    # Moving the limit for less would be a system call for nothing.
    _STEP = MEBIBYTE
    # A mapping untouched for so many samples will stay untouched; a block that is being filled is no reason to move the limit.
    _SAMPLES = 20

    def __init__(self) -> None:
        # Soft and hard limit before `set`; None while the limit is not ours.
        self._previous: tuple[int, int] | None = None
        self._most_bytes = 0
        self._limit_bytes = 0
        self._untouched: deque[int] = deque(maxlen=self._SAMPLES)
        # The meter's thread adjusts while another one lifts.
        self._lock = threading.Lock()

    def set(self, most_bytes: int) -> None:
        """Set the limit, or raise it. A stricter one that somebody else has set stays.

        Args:
            most_bytes: private memory that the process may hold.
        """
        if not sys.platform.startswith("linux"):
            return
        if self._previous is not None:
            self._most_bytes = max(self._most_bytes, most_bytes)  # the next `adjust` moves the limit
            return
        import resource

        private, data = private_and_data_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        self._most_bytes, limit = most_bytes, most_bytes + data - private
        if soft != resource.RLIM_INFINITY and soft <= limit:
            return
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        self._untouched.extend([data - private] * self._SAMPLES)
        self._previous, self._limit_bytes = (soft, hard), limit

    def adjust(self, private: int, data: int) -> None:
        """Move the limit by the size of mappings without use; called often while the limit is set.

        Args:
            private: bytes in use.
            data: bytes mapped.
        """
        with self._lock:
            if self._previous is not None:
                self._untouched.append(data - private)
                self._move(*self._previous)

    def note_freed(self, nbytes: int) -> None:
        """Remember that memory in use was given back while its mapping stays: untouched from now on, without a wait of many samples.

        Args:
            nbytes: bytes that were given back.
        """
        with self._lock:
            if self._previous is not None:
                self._untouched = deque((one + nbytes for one in self._untouched), maxlen=self._SAMPLES)
                self._move(*self._previous)

    def _move(self, soft: int, hard: int) -> None:
        """Set the limit to where the mappings without use put it, below the limits from before."""
        import resource

        limit = min(self._untouched) + self._most_bytes
        if soft != resource.RLIM_INFINITY:
            limit = min(limit, soft)
        if abs(limit - self._limit_bytes) >= self._STEP:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
            self._limit_bytes = limit

    def restore(self) -> None:
        """Restore the limit from before `set`."""
        import resource

        with self._lock:
            if self._previous is not None:
                previous, self._previous = self._previous, None
                resource.setrlimit(resource.RLIMIT_DATA, previous)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Lift the limit in a context; mappings that are there at its end, and not in use, are not counted after it."""
        was_set = self._previous is not None
        self.restore()
        try:
            yield
        finally:
            if was_set:
                self.set(self._most_bytes)

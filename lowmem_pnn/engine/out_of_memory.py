"""Out of memory: work that may run out of it, half the micro-batch where it did, and the error where nothing smaller is left."""

from collections.abc import Callable
from typing import TypeVar

from lowmem_pnn.device import Device, is_out_of_memory
from lowmem_pnn.device.budget import other_cause
from lowmem_pnn.errors import BudgetError
from lowmem_pnn.units import format_bytes

_T = TypeVar("_T")


# What a library said the last time that memory seemed to run out, where that may have meant something else.
_last_words: list[str] = []


class SteppedInPart(BudgetError):
    """Memory ran out in a batch when some of the weights had been stepped: training cannot go on from them, only from a commit."""


def unless_out_of_memory(work: Callable[[], _T]) -> _T | None:
    """Return the work's result, or None if memory ran out in it; the exception, which holds tensors, is gone by then.

    Args:
        work: a computation whose result is never None.
    """
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _last_words[:] = [other_cause(error)]
    return None


def fits(work: Callable[[], object]) -> bool:
    """Do the work, and say whether it went through; False if memory ran out in it.

    Args:
        work: a computation whose result is of no interest.
    """
    return unless_out_of_memory(lambda: (work(),)) is not None


def too_large(device: Device, what: str) -> BudgetError:
    """Return the error of memory that ran out where nothing smaller can be tried.

    Args:
        device: the training device, whose present section tells how much was in use.
        what: the work, as the message goes on after "memory ran out".
    """
    used, budget = format_bytes(device.section_peak_bytes()), format_bytes(device.budget_bytes)
    return BudgetError(
        f"memory ran out {what}: {used} of {budget} were in use{library_said()}; begin a new run with a larger --max-gpu-mem, or more partitions"
    )


def library_said() -> str:
    """Return what a library said the last time that memory seemed to run out, in brackets, where that may have meant something else."""
    return next((f" (the library said: {words})" for words in _last_words if words), "")


def halved(micro_batch: int, smallest: int) -> int | None:
    """Return half a micro-batch, at least the smallest; None where it is the smallest already.

    Args:
        micro_batch: samples on the device at once, which did not fit.
        smallest: samples that the modules accept at least.

    Example:
        >>> halved(12, smallest=2), halved(3, smallest=2), halved(2, smallest=2)
        (6, 2, None)
    """
    return None if micro_batch <= smallest else max(smallest, micro_batch // 2)

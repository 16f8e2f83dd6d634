"""Retreat: memory ran out when some weights had been stepped, so the run goes back to its last commit, with half the micro-batch."""

import gc

from lowmem_pnn.errors import BudgetError
from lowmem_pnn.run import Run
from lowmem_pnn.units import format_bytes


def go_back_with_less(run: Run, micro_batch: int) -> int:
    """Return to the last commit.

    Args:
        run: nothing of it is resident.
        micro_batch: samples on the device at once that did not fit.

    Returns:
        The micro-batch to go on with.

    Raises:
        BudgetError: it is the smallest already.
    """
    used, smallest = run.device.section_peak_bytes(), run.plan.smallest_micro_batch
    if micro_batch <= smallest:
        raise BudgetError(
            f"memory ran out with a micro-batch of {micro_batch}, the smallest: {format_bytes(used)} of "
            f"{format_bytes(run.device.budget_bytes)} were in use; give a larger --max-gpu-mem, or more partitions"
        )
    run.go_back()
    gc.collect()  # exceptions and the frames of other threads may hold tensors in cycles
    run.device.release()
    run.device.begin_section()
    run.state.oom_retries += 1
    half = max(smallest, micro_batch // 2)
    run.display.message(f"out of memory; going on from the last commit with a micro-batch of {half}")
    return half

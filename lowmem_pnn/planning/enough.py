"""Enough: the smallest budget that a run can be planned for, tried with the planner itself, for the error of one that is too small."""

import copy
import dataclasses
import re
from collections.abc import Callable

from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.units import MEGABYTE

# Budgets are named to a hundredth, in whole megabytes.
_PRECISION = 100
# A run that does not fit so many times its budget is told so without a figure.
_MOST_DOUBLINGS = 12
_NAMED = re.compile(r"--max-gpu-mem \d+MB|more --max-gpu-mem")


def naming_enough(request: PlanRequest, plan: Callable[[PlanRequest], Plan]) -> Plan:
    """Make a plan; where nothing fits, have the error name the smallest budget for which there is one.

    What a run needs beside its partitions, in its recovery epochs, or for an optimizer without fused kernels, depends on the budget in ways
    that no formula of the error knows.

    Args:
        request: workload, layer costs and device.
        plan: makes the plan.

    Raises:
        BudgetError: nothing fits.
    """
    try:
        return plan(request)
    except BudgetError as error:
        enough = smallest_budget(request, plan, error.enough_bytes or request.device.budget_bytes)
        # A number of the error's own was tried, and did not do.
        named = "more --max-gpu-mem" if enough is None else f"--max-gpu-mem {enough // MEGABYTE}MB"
        raise BudgetError(_NAMED.sub(named, str(error), count=1), enough) from None


def smallest_budget(request: PlanRequest, plan: Callable[[PlanRequest], Plan], guess: int) -> int | None:
    """Return a budget in whole megabytes for which there is a plan, and none for one that is a hundredth smaller.

    Args:
        request: workload, layer costs and device; nothing fits its budget.
        plan: makes the plan.
        guess: budget that is tried first, in bytes.
    """

    def fits(megabytes: int) -> bool:
        return _fits(request, plan, megabytes)

    below, above = request.device.budget_bytes // MEGABYTE, -(-guess // MEGABYTE)
    above = max(above, below + 1)
    for _ in range(_MOST_DOUBLINGS):
        if fits(above):
            break
        below, above = above, above + max(1, above // 8)
    else:
        return None
    return _between(fits, below, above) * MEGABYTE


def least_budget(request: PlanRequest, plan: Callable[[PlanRequest], Plan]) -> int:
    """Return the smallest budget, in whole megabytes and to a hundredth, for which there is a plan.

    Args:
        request: workload, layer costs and device; there is a plan in its budget.
        plan: makes the plan.
    """
    above = -(-request.device.budget_bytes // MEGABYTE)
    return _between(lambda megabytes: _fits(request, plan, megabytes), 0, above) * MEGABYTE


def _between(fits: Callable[[int], bool], below: int, above: int) -> int:
    """Return the least number that fits, to a hundredth, between one that does not and one that does."""
    while above - below > max(1, above // _PRECISION):
        middle = (below + above) // 2
        below, above = (below, middle) if fits(middle) else (middle, above)
    return above


def _fits(request: PlanRequest, plan: Callable[[PlanRequest], Plan], megabytes: int) -> bool:
    device = copy.copy(request.device)
    device.budget_bytes = megabytes * MEGABYTE
    try:
        plan(dataclasses.replace(request, device=device))
    except (BudgetError, ConfigError):  # a list of values may be for another number of partitions
        return False
    return True

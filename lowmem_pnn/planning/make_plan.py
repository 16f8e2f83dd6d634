"""The plan for a workload: the smallest one, the one with the largest batches, or the one that trains in the shortest time."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress

from lowmem_pnn.config.fit_config import LARGEST_AUTO_BATCH
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.batch_plan import plan_for_batches
from lowmem_pnn.planning.enough import least_budget, naming_enough
from lowmem_pnn.planning.incubation import plan_with_tails
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.time_estimate import TimeEstimator

SecondsOf = Callable[[Plan], float]
"""Function from a plan to the predicted seconds of the whole training."""


def make_plan(request: PlanRequest, seconds_of: SecondsOf | None = None) -> Plan:
    """Cut a workload's chain to fit a device.

    Args:
        request: Workload, layer costs and device.
        seconds_of: Predicted seconds of a plan, asked where the configuration wants the shortest training by measured timings.

    Returns:
        A plan whose predicted peaks are without the device's reserve.

    Raises:
        BudgetError: Nothing fits; the message names the smallest budget for which there is a plan.
        ConfigError: The model cannot have such cuts, or the lists in the configuration do not match the partitions.
    """
    config, samples = request.workload.config, len(request.workload.splits["train"])
    is_for_time = config.plan_for == "time" and not request.workload.method.incubates
    try:
        if is_for_time:
            assert seconds_of is not None, "a plan for time needs predicted seconds"
            with suppress(BudgetError):
                return _fastest(request, seconds_of)
        # Where no plan fits, the smallest budget is that of the smallest plan.
        return naming_enough(request, _smallest if is_for_time else _make_plan)
    except BudgetError as error:
        if config.batch_size == "auto" or (batch := max(config.batch_sizes)) <= samples:
            raise
        raise BudgetError(
            f"{error}; --batch-size {batch} is larger than the {samples} training samples: give at most {samples}",
            error.enough_bytes,
        ) from None


def smallest_budget_of(request: PlanRequest) -> int:
    """Return the smallest budget, in whole megabytes and to a hundredth, in which a workload can be planned for.

    Args:
        request: Workload, layer costs and device; there is a plan in its budget.
    """
    config, smallest = request.workload.config, request.profile.smallest_micro_batch

    def plan(other: PlanRequest) -> Plan:
        if request.workload.method.incubates:
            return _make_plan(other)
        return plan_for_batches(other, (smallest,) if config.batch_size == "auto" else config.batch_sizes)

    return least_budget(request, plan)


def _make_plan(request: PlanRequest) -> Plan:
    if request.workload.method.incubates:
        return plan_with_tails(request, lambda one: plan_for_batches(one, one.workload.config.batch_sizes))
    config = request.workload.config
    if config.plan_for == "auto" and _any_plan_trains_the_same(request):
        return _fastest(request, TimeEstimator.nominal(request))
    if config.batch_size == "auto":
        return _with_largest_batches(request)
    return plan_for_batches(request, config.batch_sizes)


def _smallest(request: PlanRequest) -> Plan:
    return plan_for_batches(request, request.workload.config.batch_sizes)


def _any_plan_trains_the_same(request: PlanRequest) -> bool:
    """Decide whether all plans train the same model, up to rounding, and there is a choice between plans."""
    workload, config = request.workload, request.workload.config
    if not workload.method.sweeps or config.batch_size == "auto" or config.cuts is not None or config.partitions is not None:
        return False
    # These options differ between partitions, or are for the last ones.
    if config.recovery_epochs or len(config.lr) > 1 or len(config.optimizer) > 1:
        return False
    # No code is compiled for single samples.
    if config.compile:
        return False
    # What mixes samples sees a micro-batch, and the more samples the better.
    return not request.depends_on_micro_batch


def _with_largest_batches(request: PlanRequest) -> Plan:
    """Return the plan with the largest least batch, each partition taking the largest batch that fits at once, up to that plan's bound."""
    # Two batches wait on the host beside a partition: the fewer samples a batch may have, the more room is left for them.
    plans: list[Plan] = []
    for most in (LARGEST_AUTO_BATCH >> shift for shift in range(LARGEST_AUTO_BATCH.bit_length())):
        with suppress(BudgetError):
            plans.append(plan_for_batches(request, (most,), whole_batches=False))
        if plans and _least_micro_batch(plans[-1]) == most:
            break
    if not plans:
        return plan_for_batches(request, (request.profile.smallest_micro_batch,))  # which says what does not fit
    plan = max(plans, key=_least_micro_batch)
    samples = len(request.workload.splits["train"])
    sizes = [min(part.micro_batch, samples) for part in plan.partitions]
    partitions = (
        dataclasses.replace(part, batch=size, micro_batch=size) for part, size in zip(plan.partitions, sizes, strict=True)
    )
    return dataclasses.replace(plan, partitions=tuple(partitions), whole_batches=request.whole_batches)


def _fastest(request: PlanRequest, seconds_of: SecondsOf) -> Plan:
    """Return the plan of least predicted time; of equal ones that with the fewest partitions.

    Candidates are the planner's own plans, for every least micro-batch (larger ones need more partitions), and for one and two
    partitions more than these, which may take larger micro-batches still.
    """
    config, method = request.workload.config, request.workload.method
    most = min(max(config.batch_sizes), config.micro_batch or max(config.batch_sizes))
    candidates: dict[Plan, None] = {}
    reached = 0
    for least_micro_batch in (1 << shift for shift in range(most.bit_length())):
        if least_micro_batch <= reached:  # the plan before has such micro-batches already
            continue
        # Where the first does not fit, none does. Lists may be for another number of partitions than this plan's.
        with suppress(ConfigError):
            plan = plan_for_batches(request, config.batch_sizes, least_micro_batch)
            candidates[plan] = None
            reached = _least_micro_batch(plan)
    if not candidates:
        return plan_for_batches(request, config.batch_sizes)  # which says what is wrong
    if method.num_partitions is None and config.blocks == "planner":
        counts = {len(plan.partitions) for plan in candidates}
        for number in sorted({count + more for count in counts for more in (1, 2)} - counts):
            with suppress(BudgetError, ConfigError):  # a chain has only so many layers
                candidates[plan_for_batches(request, config.batch_sizes, num_partitions=number)] = None
    return min(candidates, key=lambda plan: (seconds_of(plan), len(plan.partitions)))


def _least_micro_batch(plan: Plan) -> int:
    return min(part.micro_batch for part in plan.partitions)

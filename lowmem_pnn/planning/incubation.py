"""Plans for partitions that learn inside a meta model: the thin parts after a partition take memory beside it.

Which thin parts there are depends on the cuts, and the cuts on how much memory they take. So plans are made again, each with the largest
tail of the one before kept free beside every partition, until no tail is larger than that.
"""

import dataclasses
from collections.abc import Callable, Sequence

from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.batch_plan import plan_for_batches
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.profiling.costs import Affine, LayerCost
from lowmem_pnn.profiling.peaks import peak_of
from lowmem_pnn.workload import MetaModel, meta_model, profile_workload


def plan_with_tails(request: PlanRequest, make: Callable[[PlanRequest], Plan]) -> Plan:
    """Make a plan whose partitions fit beside the frozen thin parts that their loss goes through; and one for the meta model.

    Args:
        request: Workload, layer costs and device.
        make: Makes a plan for the tails that a request counts.

    Raises:
        BudgetError: Nothing fits.
        ConfigError: There is no meta model for the cuts.
    """
    while True:
        plan = make(request)
        if len(plan.partitions) == 1:
            return plan
        meta = meta_model(request.workload, plan.spans)
        whole = PlanRequest(meta.workload, profile_workload(meta.workload, request.device), request.device)
        tails = [_tail_bytes(request, meta, whole, number) for number in range(len(meta.parts) - 1)]
        largest = Affine(max(tail.fixed for tail in tails), max(tail.per_sample for tail in tails))
        before = request.tail
        if largest.fixed <= before.fixed and largest.per_sample <= before.per_sample:
            return _with_meta_model(plan, meta, whole)
        tail = Affine(max(largest.fixed, before.fixed), max(largest.per_sample, before.per_sample))
        request = dataclasses.replace(request, tail=tail)


def _with_meta_model(plan: Plan, meta: MetaModel, whole: PlanRequest) -> Plan:
    """Note the costs of a meta model in a plan."""
    try:
        own = plan_for_batches(whole, whole.workload.config.batch_sizes)
    except (BudgetError, ConfigError) as error:
        message = f"the meta model of {len(meta.parts)} thin parts: {error}"
        if isinstance(error, BudgetError):
            raise BudgetError(message, error.enough_bytes) from None
        raise ConfigError(message) from None
    macs = tuple(sum(cost.forward_macs for cost in _costs_of_part(meta, whole, number)) for number in range(len(meta.parts)))
    return dataclasses.replace(
        plan,
        thin_macs=macs,
        meta_params=own.partitions[0].num_params,
        meta_peak_bytes=own.predicted_peak_bytes,
        predicted_peak_bytes=max(plan.predicted_peak_bytes, own.predicted_peak_bytes),
    )


def _tail_bytes(request: PlanRequest, meta: MetaModel, whole: PlanRequest, partition: int) -> Affine:
    """Return the memory of the tail after a partition: weights without gradients; activations, loss and gradients for each sample."""
    costs = [
        dataclasses.replace(cost, gradient_bytes=0, optimizer_bytes=0, step_bytes=0)
        for number in range(partition + 1, len(meta.parts))
        for cost in _costs_of_part(meta, whole, number)
    ]
    loss = whole.objective_memory(whole.num_layers)
    most = max(request.workload.config.batch_sizes)
    # The peak is convex in the samples, so that the chord is never below it.
    one, many = (peak_of(costs, samples, samples, loss) for samples in (1, max(2, most)))
    slope = -(-(many - one) // (max(2, most) - 1))
    # And the kernels of its convolutions, which are kept beside those of the partition.
    return Affine(max(0, one - slope) + whole.profile.kernel_bytes, slope)


def _costs_of_part(meta: MetaModel, whole: PlanRequest, number: int) -> Sequence[LayerCost]:
    """Return the costs of the meta model's layers that a thin part has: those with its tensors, and what comes after these."""
    owners: list[int] = []
    for layer in whole.workload.chain.layers:
        names = [*layer.parameters(), *layer.buffers()]
        owners.append(int(names[0].partition(".")[0]) if names else (owners[-1] if owners else 0))
    return [cost for owner, cost in zip(owners, whole.costs.layers, strict=True) if owner == number]

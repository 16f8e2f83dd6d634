"""Another budget than training's: a run's partitions, divided until they fit a smaller one, or all in one where it is large enough."""

import dataclasses

from lowmem_pnn.errors import BudgetError
from lowmem_pnn.partition_plan import PartitionPlan, Plan
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload


def within(plan: Plan, workload: Workload, budget_bytes: int) -> Plan:
    """Return a run's plan for another budget: in a smaller one partitions whose weights take more than half of it are divided.

    In a larger one the plan stays as it is. Micro-batches are halved while samples go forward, where they do not fit.

    Args:
        plan: plan of the run.
        workload: its model.
        budget_bytes: the budget.

    Raises:
        BudgetError: a layer alone is larger than the budget.
    """
    sizes = [
        sum(tensor.nbytes for tensor in (*layer.parameters().values(), *layer.buffers().values()))
        for layer in workload.chain.layers
    ]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    if sizes[largest] > budget_bytes:
        raise BudgetError(
            f"layer {workload.chain.layers[largest].name!r} alone has {format_bytes(sizes[largest])} of weights, above the budget of "
            f"{format_bytes(budget_bytes)}; give a larger --max-gpu-mem"
        )
    if budget_bytes >= plan.budget_bytes:
        return plan
    bounds: list[tuple[PartitionPlan, int, int]] = []
    for part in plan.partitions:
        begin, held = part.start, 0
        for layer in range(part.start, part.stop):
            if layer > begin and held + sizes[layer] > budget_bytes // 2:
                bounds.append((part, begin, layer))
                begin, held = layer, 0
            held += sizes[layer]
        bounds.append((part, begin, part.stop))
    # By the bytes of a sample follows how many are read at once.
    widths = [sum(spec.sample_bytes for spec in specs) for specs in workload.chain.boundaries]
    parts = [
        dataclasses.replace(
            part, start=start, stop=stop, input_bytes_per_sample=widths[start], output_bytes_per_sample=widths[stop]
        )
        for part, start, stop in bounds
    ]
    # Nothing mixes the samples of a batch any more: what had to learn from all of it at once goes forward in pieces.
    return dataclasses.replace(plan, partitions=tuple(parts), whole_batches=False)


def in_one_partition(plan: Plan, workload: Workload) -> Plan:
    """Return a run's plan with all layers in one partition, for what only goes forward.

    Args:
        plan: plan of the run.
        workload: its model.
    """
    first, layers = plan.partitions[0], workload.chain.layers
    whole = dataclasses.replace(
        first,
        stop=len(layers),
        micro_batch=min(part.micro_batch for part in plan.partitions),
        output_bytes_per_sample=sum(spec.sample_bytes for spec in workload.chain.boundaries[-1]),
    )
    return dataclasses.replace(plan, partitions=(whole,), whole_batches=False)

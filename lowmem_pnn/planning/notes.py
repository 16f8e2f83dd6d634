"""Notes on a plan: in what training by it differs from plain PyTorch's, in a line each."""

from collections.abc import Mapping
from types import MappingProxyType

from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.batch_norm import whole_batch_notes
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.workload import Workload


def plan_notes(request: PlanRequest, plan: Plan, mixing: Mapping[str, int] = MappingProxyType({})) -> list[str]:
    """Return all notes on a plan.

    Args:
        request: workload, layer costs and device.
        plan: plan for the request.
        mixing: modules that mix samples, with the numbers of their layers; nobody knows before the model was built with its values.
    """
    return [*whole_batch_notes(request, plan, mixing), *micro_batch_notes(request.workload, plan)]


def micro_batch_notes(workload: Workload, plan: Plan) -> list[str]:
    """Return what is done for each micro-batch that plain PyTorch does once for a batch, beside BatchNorm.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
    """
    hooked: list[str] = []
    kept: list[str] = []
    size = batch = 0
    for part in plan.partitions:
        micro_batch = (
            plan.sweep_micro_batch if workload.method.sweeps else min(part.micro_batch, plan.sweep_micro_batch or part.batch)
        )
        if micro_batch >= part.batch:
            continue
        layers = workload.chain.layers[part.start : part.stop]
        own_hooks = [name for layer in layers for name, hooks in layer.hooks.items() if hooks.see_gradients]
        own_state = [name for layer in layers for name in layer.python_state]
        if own_hooks or own_state:
            hooked, kept, size, batch = [*hooked, *own_hooks], [*kept, *own_state], micro_batch, part.batch
    samples = f"of {size} of the {batch} samples of a batch, and in plain PyTorch once for all of them"
    notes = []
    if workload.needs_whole_batch:
        notes.append("the loss of a batch is not made up of the losses of its parts: every batch goes through at once")
    if hooked:
        notes.append(
            f"hooks on gradients (of {hooked[0]!r}{f' and {len(hooked) - 1} more' if len(hooked) > 1 else ''}) run for each gradient {samples}"
        )
    if kept:
        notes.append(f"forwards change {', '.join(map(repr, kept))} once for each micro-batch {samples}")
    return notes

"""Notes on a plan: in what training by it differs from plain PyTorch's, in a line each."""

from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.batch_norm import batch_norm_note
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.workload import Workload


def plan_notes(request: PlanRequest, plan: Plan) -> list[str]:
    """Return all notes on a plan.

    Args:
        request: workload, layer costs and device.
        plan: plan for the request.
    """
    norms = batch_norm_note(request, plan)
    whole = [f"layer {layer.name!r} is {layer.whole}" for layer in request.workload.chain.layers if layer.whole]
    return [
        *([norms] if norms is not None else []),
        *micro_batch_notes(request.workload, plan),
        *idle_notes(request.workload),
        *whole,
    ]


def idle_notes(workload: Workload) -> list[str]:
    """Return which parameters stay as they are, since no gradient comes to them.

    Args:
        workload: model, data and method.
    """
    idle = workload.bare.idle
    if not idle:
        return []
    more = f" and {len(idle) - 1} more parameters get" if len(idle) > 1 else " gets"
    return [f"{idle[0]!r}{more} no gradient, since the output does not depend on them: kept as they are, as in plain PyTorch"]


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
    if hooked:
        notes.append(
            f"hooks on gradients (of {hooked[0]!r}{f' and {len(hooked) - 1} more' if len(hooked) > 1 else ''}) run for each gradient {samples}"
        )
    if kept:
        notes.append(f"forwards change {', '.join(map(repr, kept))} once for each micro-batch {samples}")
    return notes

"""Which layers' products a sweep keeps from the first forward for the second: those where that is faster, as far as the disk has room."""

import dataclasses
from collections.abc import Callable

from lowmem_pnn.methods import Sweep
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.disk_footprint import disk_bytes
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.profiling.costs import LayerCost, Product
from lowmem_pnn.profiling.nominal import keeping_rule, speed_of
from lowmem_pnn.units import format_bytes

# Share of what is free on the disk that a run may come to take by what it keeps.
_FREE_SHARE = 0.9


def with_kept_products(request: PlanRequest, plan: Plan) -> Plan:
    """Return a plan with the layers whose products its sweeps keep.

    Args:
        request: workload, layer costs and device.
        plan: partitions and their micro-batches.
    """
    workload, shares_host = request.workload, request.device.shares_host
    rule, speed = keeping_rule(workload.config.recompute, shares_host=shares_host), speed_of(shares_host=shares_host)
    batch = plan.partitions[-1].batch
    room = _room(request, plan) if workload.config.recompute == "auto" else None
    gains: dict[int, tuple[float, int]] = {}
    for number in _layers_run_twice(request, plan):
        kept = kept_products(request.profile.layers[number], rule)
        nbytes = batch * sum(product.nbytes for product in kept)
        computing = sum(product.macs for product in kept) * speed.mac
        moving = sum(product.nbytes for product in kept) * (speed.written_byte + speed.read_byte)
        # In a small layer the calls that move its products take longer than its products.
        gain = plan.sweep_micro_batch * (computing - moving) - len(kept) * speed.call
        if kept and (gain > 0 or workload.config.recompute == "never"):
            gains[number] = gain / nbytes, nbytes
    chosen, taken = [], 0
    for number in sorted(gains, key=lambda number: (-gains[number][0], number)):
        if room is None or taken + gains[number][1] <= room:
            chosen.append(number)
            taken += gains[number][1]
    return dataclasses.replace(plan, kept_layers=tuple(sorted(chosen)), kept_bytes=taken)


def kept_notes(plan: Plan) -> list[str]:
    """Return what is said of products that sweeps keep instead of computing them again.

    Args:
        plan: partitions of the model.
    """
    if not plan.kept_layers:
        return []
    count, size = len(plan.kept_layers), format_bytes(plan.kept_bytes)
    return [
        f"products of {count} layer{'s' if count > 1 else ''} are kept in a file from forward to backward, {size} a batch "
        "(--recompute always: none, they are computed twice)"
    ]


def _room(request: PlanRequest, plan: Plan) -> int | None:
    """Return the bytes that the run's folder has left for products; None where nothing bounds them."""
    free, bounds = request.free_disk_bytes, [request.workload.config.max_disk]
    if free is not None:
        bounds.append(int(_FREE_SHARE * free))
    most = min((bound for bound in bounds if bound is not None), default=None)
    return None if most is None else most - disk_bytes(request.workload, plan, request.profile)


def kept_products(layer: LayerCost, rule: Callable[[Product], bool]) -> list[Product]:
    """Return the products of a layer that are kept, where any of them are.

    Args:
        layer: cost of the layer.
        rule: rule of `keeping_rule`.
    """
    return [product for product in layer.products if rule(product)]


def _layers_run_twice(request: PlanRequest, plan: Plan) -> list[int]:
    """Return the layers whose partitions go forward in one visit of a sweep, and once more in a later one, to go back."""
    twice: set[int] = set()
    for item in request.workload.program(plan.spans):
        if isinstance(item, Sweep):
            emitted, returned = (
                {visit.partition for visit in item.visits if visit.action == action} for action in ("emit", "backpropagate")
            )
            twice |= emitted & returned
    chain = request.workload.chain
    layers = (layer for number in sorted(twice) for layer in range(plan.partitions[number].start, plan.partitions[number].stop))
    # Compiled code is one operation, whose inside nobody sees.
    return [layer for layer in layers if chain.layers[layer].compiled is None]

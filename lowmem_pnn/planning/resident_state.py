"""Which weights and optimizer state of a sweep stay in memory between its visits: as much as a plan leaves room for."""

import dataclasses
from collections.abc import Sequence

from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.footprint import Footprint
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.profiling.costs import LayerCost
from lowmem_pnn.units import format_bytes

# How often a byte is read and written for a batch: weights of a partition that is visited twice are read twice; state is read once.
_MOVES_TWICE, _MOVES_ONCE = 3, 2


def with_resident_state(request: PlanRequest, plan: Plan) -> Plan:
    """Return a plan with the layers whose weights and optimizer state stay in memory, which its predicted peaks then count.

    What moves most often for its size comes first: weights of partitions that are visited twice, then optimizer state and the weights of
    the last partition. A partition's own weights are in memory while it is visited, whether they stay or not.

    Args:
        request: Workload, layer costs and device.
        plan: A plan of sweeps.
    """
    device, workload = request.device, request.workload
    if not device.shares_host:
        return plan  # there weights and state come through the host
    # A second reserve, for what the check before training may find above the plan.
    limit = device.budget_bytes - 2 * device.reserve_bytes - Footprint.of(request).waiting_bytes()
    layers, last = request.profile.layers, len(plan.partitions) - 1
    ties = {layer for layer, cost in enumerate(layers) if cost.ties}
    candidates: list[tuple[int, int, int, str]] = []  # moves, partition, layer, what
    for number, part in enumerate(plan.partitions):
        if part.stop <= workload.fixed_layers:
            continue
        for layer in range(part.start, part.stop):
            if layer not in ties and layers[layer].gradient_bytes:
                candidates.append((_MOVES_TWICE if number < last else _MOVES_ONCE, number, layer, "weights"))
                candidates.append((_MOVES_ONCE, number, layer, "state"))
    room = _Room([part.predicted_peak_bytes for part in plan.partitions], limit)
    chosen: dict[str, list[int]] = {"weights": [], "state": []}
    taken = 0
    for _, number, layer, what in sorted(candidates, key=lambda one: (-one[0], one[3] == "state", one[1:])):
        nbytes = _bytes_of(layers[layer], what)
        if nbytes and room.take(number, nbytes, own_is_there=what == "weights"):
            chosen[what].append(layer)
            taken += nbytes
    partitions = [
        dataclasses.replace(part, predicted_peak_bytes=peak) for part, peak in zip(plan.partitions, room.peaks, strict=True)
    ]
    return dataclasses.replace(
        plan,
        partitions=tuple(partitions),
        predicted_peak_bytes=max(room.peaks),
        resident_weights=tuple(sorted(chosen["weights"])),
        resident_state=tuple(sorted(chosen["state"])),
        resident_bytes=taken,
    )


def resident_notes(plan: Plan) -> list[str]:
    """Return what is said of weights and optimizer state that stay in memory from one batch of a sweep to the next.

    Args:
        plan: partitions of the model.
    """
    if not plan.resident_bytes:
        return []
    layers = plan.partitions[-1].stop
    kinds = (("weights", plan.resident_weights), ("optimizer state", plan.resident_state))
    parts = [f"the {what} of {'all' if len(own) == layers else len(own)} of {layers} layers" for what, own in kinds if own]
    return [f"there is room for {' and '.join(parts)} to stay in memory from batch to batch: {format_bytes(plan.resident_bytes)}"]


def _bytes_of(layer: LayerCost, what: str) -> int:
    return layer.gradient_bytes if what == "weights" else layer.optimizer_bytes


class _Room:
    """The room that the partitions' peaks leave.

    Args:
        peaks: Predicted peak of each partition.
        limit: Most that a peak may become.
    """

    def __init__(self, peaks: Sequence[int], limit: int) -> None:
        self.peaks, self._limit = list(peaks), limit

    def take(self, number: int, nbytes: int, *, own_is_there: bool) -> bool:
        """Add bytes of a partition to the peaks, if they fit; return whether they do.

        Args:
            number: Number of the partition that they belong to.
            nbytes: The bytes.
            own_is_there: Whether they are in that partition's own peak already.
        """
        raised = [peak + (0 if own_is_there and one == number else nbytes) for one, peak in enumerate(self.peaks)]
        if any(peak > self._limit and peak > before for peak, before in zip(raised, self.peaks, strict=True)):
            return False
        self.peaks = raised
        return True

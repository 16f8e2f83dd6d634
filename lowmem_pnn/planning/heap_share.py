"""Heap share: the part of a partition's peak that comes from the heap of malloc, which alone keeps freed memory."""

from dataclasses import replace

from lowmem_pnn.memory.aligned import HUGE_BYTES
from lowmem_pnn.memory.heap import mmap_threshold
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.partition_plan import PartitionPlan
from lowmem_pnn.planning.footprint import Footprint
from lowmem_pnn.planning.planner import partition_peak
from lowmem_pnn.profiling.costs import Affine, Envelope, LayerCost

_FLOAT_BYTES = 4


class HeapShare:
    """The bytes of partitions' peaks that come from the heap.

    Parameters that are large blocks are mapped by themselves, and so are their gradients and optimizer state: they leave no holes.

    Args:
        footprint: Memory beside the partitions.
    """

    def __init__(self, footprint: Footprint) -> None:
        self._footprint = footprint
        request, threshold = footprint.request, mmap_threshold(footprint.budget_bytes)
        # Large blocks of the streams' pool are mapped too: slices of parameters and of their state are not large where the budget is small.
        self._mapped_slices = footprint.buffer_sizes.slice_elements * _FLOAT_BYTES >= min(threshold, HUGE_BYTES)
        layers = [
            _from_heap(layer, cost, threshold, self._mapped_slices)
            for layer, cost in zip(request.workload.chain.layers, request.costs.layers, strict=True)
        ]
        self._profile = replace(request.costs, layers=tuple(layers))

    def bytes_of(self, part: PartitionPlan, beside: int) -> int:
        """Return the bytes of a partition's peak that come from the heap.

        Args:
            part: The partition.
            beside: Bytes beside the partition while it trains.
        """
        footprint, request, layers = self._footprint, self._footprint.request, self._profile.layers
        objective = request.objective_memory(part.stop)
        within = partition_peak(self._profile, part.start, part.stop, part.micro_batch, part.batch, objective)
        if request.workload.method.sweeps and request.device.shares_host:
            prefetched = footprint.stream_bytes(footprint.buffer_sizes.stream_bytes)
            small = sum(cost.weight_bytes + cost.optimizer_bytes + cost.streamed_state_bytes for cost in layers)
            if not self._mapped_slices:
                small = sum(cost.streamed_state_bytes + cost.weight_bytes for cost in request.costs.layers)
            beside -= prefetched - min(prefetched, small)
        return max(0, within) + beside


def _from_heap(layer: Layer, cost: LayerCost, threshold: int, mapped_slices: bool) -> LayerCost:
    """Return the cost of a layer without its parameters of at least so many bytes, their gradients and their state.

    Of state that is streamed in slices nothing is taken away, unless the slices are mapped too.
    """
    large = [parameter for parameter in layer.parameters().values() if parameter.nbytes >= threshold]
    mapped = min(cost.weight_bytes, sum(parameter.nbytes for parameter in large))
    gradients = min(cost.gradient_bytes, sum(parameter.nbytes for parameter in large if parameter.requires_grad))

    def of_heap(state: int) -> int:
        return state - state * gradients // max(1, cost.gradient_bytes)

    def without_gradients(peak: Affine | Envelope) -> Envelope:
        moments = peak.moments if isinstance(peak, Envelope) else (peak,)
        return Envelope(tuple(Affine(moment.fixed - gradients, moment.per_sample) for moment in moments))

    return replace(
        cost,
        weight_bytes=cost.weight_bytes - mapped,
        gradient_bytes=cost.gradient_bytes - gradients,
        freed_gradient_bytes=max(0, cost.freed_gradient_bytes - gradients),
        optimizer_bytes=of_heap(cost.optimizer_bytes),
        streamed_state_bytes=of_heap(cost.streamed_state_bytes) if mapped_slices else cost.streamed_state_bytes,
        backward_peak=without_gradients(cost.backward_peak),
        complete=without_gradients(cost.complete),
        ties=tuple(tie for tie in cost.ties if tie.weight_bytes < threshold),
    )

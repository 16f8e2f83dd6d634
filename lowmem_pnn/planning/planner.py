"""The planner: which layers make a partition, and how many samples go through it at once, so that everything fits the budget.

Preferences, in this order:

1. a micro-batch of at least min(batch, 32) everywhere; else of 16, 8, ..., down to the fewest samples that the modules accept;
2. the fewest partitions (or as many as asked for);
3. the least traffic through the boundaries, in bytes per sample;
4. the smallest largest training state;
5. the earliest cuts.

Then each partition gets the largest micro-batch that fits. Integers in, integers out: no torch, no device.
"""

from collections.abc import Sequence
from itertools import pairwise

from lowmem_pnn.errors import BudgetError
from lowmem_pnn.partition_plan import PartitionPlan, Plan
from lowmem_pnn.planning.constraints import Constraints
from lowmem_pnn.planning.search import GOOD_MICRO_BATCH, possible_starts
from lowmem_pnn.profiling.costs import Affine, MemoryProfile, ties_counted_once
from lowmem_pnn.profiling.peaks import default_objective, largest_micro_batch, peak_of
from lowmem_pnn.units import MEGABYTE, format_bytes


def plan(constraints: Constraints, budget_bytes: int, good_micro_batch: int = GOOD_MICRO_BATCH) -> Plan:
    """Cut a chain into partitions that fit a budget.

    Args:
        constraints: The chain, what its partitions have to be, and what is needed beside them.
        budget_bytes: Most bytes of a partition and of what is beside it together.
        good_micro_batch: Micro-batch, a power of two, above which a larger one is no reason for more partitions.

    Returns:
        The best plan in the order of the module's docstring.

    Raises:
        BudgetError: Nothing fits; the message says what does not, and the smallest budget that would do.
    """
    profile, search, beside = constraints.profile, constraints.search(budget_bytes), constraints.beside(budget_bytes)
    overhead = constraints.overhead(budget_bytes)
    room = budget_bytes - overhead
    least_micro_batch, bounds = search.best(room, good_micro_batch)
    if bounds is None:
        raise BudgetError(_explain(constraints, budget_bytes), smallest_budget(constraints))
    spans = list(pairwise(bounds))
    chosen = [search.choose_micro_batch(number, *span, least_micro_batch, room) for number, span in enumerate(spans)]
    if constraints.uniform:
        smallest = min(size for size, _ in chosen)
        chosen = [(smallest, search.peak(number, *span, smallest)) for number, span in enumerate(spans)]
    partitions = []
    for number, ((start, stop), (size, peak)) in enumerate(zip(spans, chosen, strict=True)):
        layers = ties_counted_once(profile.layers[start:stop])
        partitions.append(
            PartitionPlan(
                start=start,
                stop=stop,
                micro_batch=size,
                batch=constraints.batch_of(number),
                predicted_peak_bytes=peak + beside[start] + overhead,
                state_bytes=sum(layer.state_bytes for layer in layers),
                num_params=sum(layer.num_params for layer in layers),
                input_bytes_per_sample=layers[0].input_bytes.per_sample,
                output_bytes_per_sample=layers[-1].output_bytes.per_sample,
                forward_macs=sum(layer.forward_macs for layer in layers),
            )
        )
    return Plan(
        partitions=tuple(partitions),
        budget_bytes=budget_bytes,
        overhead_bytes=overhead,
        predicted_peak_bytes=max(partition.predicted_peak_bytes for partition in partitions),
        smallest_micro_batch=profile.smallest_micro_batch,
        whole_batches=constraints.whole_batches,
    )


def partition_peak(
    profile: MemoryProfile,
    start: int,
    stop: int,
    micro_batch: int,
    batch: int,
    loss: Affine | None = None,
    overhead_bytes: int = 0,
) -> int:
    """Return the peak of a partition while it trains (the table in `lowmem_pnn.profiling.peaks`), in bytes.

    Args:
        profile: Memory costs of the layers.
        start: First layer of the partition.
        stop: Layer after the last.
        micro_batch: Samples on the device at once.
        batch: Samples of an optimizer step.
        loss: Bytes of the objective: `fixed` all the time, `per_sample` between forward and backward; None for three times the outputs
            (targets, differences, gradient).
        overhead_bytes: Bytes that are needed beside the partition.
    """
    objective = default_objective(profile.layers[stop - 1]) if loss is None else loss
    largest = largest_micro_batch(batch, micro_batch, profile.smallest_micro_batch)
    return peak_of(profile.layers[start:stop], largest, batch, objective) + overhead_bytes


def smallest_budget(constraints: Constraints) -> int:
    """Return the smallest budget that `plan` can meet, in bytes, with micro-batches as small as the modules accept.

    Args:
        constraints: The chain, what its partitions have to be, and what is needed beside them.
    """
    # From below: what is beside partitions grows by less than the budget does, so that this ends, at the first budget that is enough.
    budget = 0
    while (needed := constraints.search(budget).smallest_room() + constraints.overhead(budget)) > budget:
        budget = needed
    return budget


def _explain(constraints: Constraints, budget_bytes: int) -> str:
    """Say in one line why nothing fits, and what would help."""
    search, overhead = constraints.search(budget_bytes), constraints.overhead(budget_bytes)
    room = budget_bytes - overhead
    remedies = [f"--max-gpu-mem {-(-smallest_budget(constraints) // MEGABYTE)}MB"]
    starts, end = possible_starts(constraints.profile), len(constraints.profile.layers)
    if constraints.cuts is not None:
        bounds = [0, *constraints.cuts, end]
        number, need = _largest(search.cheapest_peaks(bounds))
        start, stop = bounds[number], bounds[number + 1]
        whose = "the whole model as one partition" if len(bounds) == 2 else f"partition {number + 1} of {len(bounds) - 1}"
        subject = f"{whose} ({constraints.title(start, stop)}) needs"
        inside = [layer for layer in starts if start < layer < stop]
        if inside and search.smallest_room_between(start, stop) <= room:
            remedies.append("more --cuts in it")
    elif constraints.num_partitions is not None:
        need = search.smallest_room()
        number = constraints.num_partitions
        subject = "the whole model as one partition needs" if number == 1 else f"the largest of {number} partitions needs"
        unconstrained = constraints.search(budget_bytes, any_cuts=True)
        if len(constraints.batches) == 1 and unconstrained.smallest_room() <= room:
            _, fewest = unconstrained.best(room)
            assert fewest is not None, "there is room for some partitions"
            remedies.append(f"--partitions {len(fewest) - 1}")
    else:
        need, bounds = search.smallest_room(), [*starts, end]
        if max(search.cheapest_peaks(bounds)) > need:
            # Fewer cuts need less, since a cut has samples read that a layer before it makes.
            bounds = search.best(need)[1] or bounds
        number, need = _largest(search.cheapest_peaks(bounds))
        start, stop = bounds[number], bounds[number + 1]
        subject = f"{constraints.title(start, stop)} {_needs(starts, start, stop)}"
    smaller = _helpful_batch(constraints, budget_bytes, room)
    if smaller is not None:
        remedies.append(f"--batch-size {smaller}")
    # To the byte where rounding would make the two sizes look the same.
    needed, budget = format_bytes(need + overhead), format_bytes(budget_bytes)
    if needed == budget:
        needed, budget = f"{need + overhead} B", f"{budget_bytes} B"
    return f"{subject} {needed}, above the budget of {budget}; give {', or '.join(remedies)}"


def _needs(starts: Sequence[int], start: int, stop: int) -> str:
    """Return the verb of a range of layers that needs too much."""
    if stop == start + 1:
        return "alone needs"
    return "need" if any(start < layer < stop for layer in starts) else "share a weight and need"


def _helpful_batch(constraints: Constraints, budget_bytes: int, room: int) -> int | None:
    """Return the largest power of two below the batch size with which the room would do; None if there is none.

    A batch that goes through at once has no gradients in memory during its forward.
    """
    smallest = constraints.profile.smallest_micro_batch
    if len(constraints.batches) > 1 or constraints.search(budget_bytes, batch=smallest).smallest_room() > room:
        return None
    size = 1 << (constraints.batches[0].bit_length() - 1)
    while size >= smallest:
        if size < constraints.batches[0] and constraints.search(budget_bytes, batch=size).smallest_room() <= room:
            return size
        size //= 2
    return None


def _largest(peaks: Sequence[int]) -> tuple[int, int]:
    """Return the position of the largest peak, and the peak."""
    return max(enumerate(peaks), key=lambda item: item[1])

"""NeuroFlux blocks: cuts such that the layers of a block can take about the same number of samples at once.

    feasible batch   8  10  12 | 40  44  48 | 200  256  256
                     block 1     block 2      block 3

A layer alone could take its own feasible batch; in a block all layers take the smallest one. So a block goes on for as long as the
feasible batches differ by less than a tolerance, and as long as the block fits with the smallest of them (the Partitioner of arXiv
2402.14139; the rule is ours).
"""

from collections.abc import Sequence

from lowmem_pnn.profiling.costs import Affine, MemoryProfile
from lowmem_pnn.profiling.peaks import peak_of


def feasible_batch(profile: MemoryProfile, start: int, stop: int, most: int, room: int, objective: Affine) -> int:
    """Return the most samples that a range of layers can take at once, as a whole batch.

    Args:
        profile: Memory costs of the layers.
        start: First layer of the range.
        stop: Layer after the last.
        most: Most samples to try.
        room: Bytes that the range may take.
        objective: Bytes of the loss.

    Returns:
        A number of samples up to `most`; 0 if not even the fewest that the modules accept fit.
    """
    layers = profile.layers[start:stop]
    low, high = profile.smallest_micro_batch - 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak_of(layers, middle, middle, objective) <= room else (low, middle - 1)
    return low if low >= profile.smallest_micro_batch else 0


def similar_batch_cuts(
    profile: MemoryProfile, *, most: int, room: int, objectives: Sequence[Affine], tolerance: float
) -> list[int]:
    """Return the layers that begin a block, without 0.

    Args:
        profile: Memory costs of the layers.
        most: Most samples at once.
        room: Bytes that a block may take.
        objectives: For each layer, bytes of the loss of a block that ends with the layer.
        tolerance: Most relative difference between the feasible batches of a block's layers, below 1.
    """
    feasible = [
        feasible_batch(profile, number, number + 1, most, room, objectives[number]) for number in range(len(profile.layers))
    ]
    cuts, start = [], 0
    for number in range(1, len(profile.layers)):
        least, largest = min(feasible[start : number + 1]), max(feasible[start : number + 1])
        fits = peak_of(profile.layers[start : number + 1], max(least, 1), max(least, 1), objectives[number]) <= room
        # A layer that does not fit alone is for the planner to refuse.
        if number not in profile.forbidden_cuts and (not fits or largest - least > tolerance * largest):
            cuts.append(number)
            start = number
    return cuts

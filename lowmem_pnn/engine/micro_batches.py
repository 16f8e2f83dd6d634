"""Micro-batches: a batch cut into parts that go through the device one at a time (gradient accumulation)."""

from collections.abc import Sequence


def micro_batches(total: int, size: int, smallest: int) -> Sequence[slice]:
    """Cut a batch into micro-batches of `size`; a rest that would be under `smallest` joins the one before it.

    Args:
        total: samples in the batch.
        size: samples in a micro-batch.
        smallest: samples that the modules accept at least.

    Example:
        >>> [part.stop - part.start for part in micro_batches(9, 4, smallest=2)]
        [4, 5]
    """
    starts = list(range(0, total, size))
    if len(starts) > 1 and total - starts[-1] < smallest:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], total], strict=True)]

"""Seeds: every random choice of a run follows from its seed and its place in the run, so that no random state needs saving."""

import hashlib


def seed_of(*place: int | str) -> int:
    """A seed for one place in a run.

    A micro-batch's forward starts from `seed_of(seed, "forward", partition, step, micro_batch)`, where `step` counts the partition's
    optimizer steps from 0: a loop in plain PyTorch that calls `torch.manual_seed` with it sees the same dropout.

    Args:
        *place: numbers and words that name the place, the run's seed first.

    Returns:
        A number in [0, 2**63), the same on every machine.

    Example:
        >>> seed_of(0, "order", 3) == seed_of(0, "order", 3), seed_of(0, "order", 3) == seed_of(1, "order", 3)
        (True, False)
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

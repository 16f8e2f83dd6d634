"""Seeds: every random choice of a run is a function of the run's seed and of a key, so that no random state needs saving."""

import hashlib

import numpy as np
import numpy.typing as npt


def seed_of(*key: int | str) -> int:
    """Return the seed for one place in a run.

    A micro-batch's forward starts from `seed_of(seed, "forward", partition, step, micro_batch)`, where `step` counts the partition's
    optimizer steps from 0: a loop in plain PyTorch that calls `torch.manual_seed` with it sees the same dropout.

    Args:
        *key: Numbers and words that name a place in the run, the run's seed first.

    Returns:
        A number in [0, 2**63), the same on every machine.

    Example:
        >>> seed_of(0, "order", 3) == seed_of(0, "order", 3), seed_of(0, "order", 3) == seed_of(1, "order", 3)
        (True, False)
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation_of(size: int, *key: int | str) -> npt.NDArray[np.int64]:
    """Return a random order for one place in a run.

    Random words are all that is taken of numpy: its shuffles may change from release to release, these may not.

    Args:
        size: Number of things to order.
        *key: Numbers and words that name a place in the run, the run's seed first.

    Example:
        >>> sorted(permutation_of(4, 0, "epoch", 1).tolist())
        [0, 1, 2, 3]
    """
    words = np.random.Philox(key=seed_of(*key)).random_raw(size)
    return np.argsort(words, kind="stable")

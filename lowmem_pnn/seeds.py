"""Seeds: every random choice of a run is a function of the run's seed and of a key, so that no random state needs saving."""

import hashlib
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# numpy's global generator takes seeds of 32 bits.
_NUMPY_SEEDS = 2**32


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


def seed_generators(seed: int) -> None:
    """Seed torch's generators as `torch.manual_seed` does, but for those of devices that torch has not begun to use.

    For each kind of these, `torch.manual_seed` takes down where it was called from: a millisecond and more, at every micro-batch.

    Args:
        seed: the seed.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the states of the CPU random generators of torch, Python and numpy at the end of the context."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


@contextmanager
def preserve_gpu_random_state() -> Iterator[None]:
    """Restore the states of the GPUs' random generators at the end of the context: `torch.manual_seed` seeds them too.

    GPUs that torch has not begun to use are not asked, since that would make contexts on them. They get the seed of the CPU's generator,
    as `torch.manual_seed` has given it to both.
    """
    states = None
    if torch.cuda.is_initialized():
        states = [torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())]
    seed = torch.initial_seed()
    try:
        yield
    finally:
        if states is None:
            torch.cuda.manual_seed_all(seed)
        else:
            for index, state in enumerate(states):
                torch.cuda.set_rng_state(state, index)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random generators of torch, Python and numpy in a context, at whose end they are as before.

    What a constructor draws in it is the same in every process, and of torch's generator the same as after `torch.manual_seed(seed)`.

    Args:
        seed: the seed, which numpy takes modulo 2**32.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(()), random.random(), np.random.rand()
        >>> with seeded(3):
        ...     print(first == (torch.rand(()), random.random(), np.random.rand()))
        True
    """
    with preserve_random_state(), preserve_gpu_random_state():
        torch.manual_seed(seed)
        _seed_others(seed)
        yield


@contextmanager
def host_seeded(seed: int) -> Iterator[None]:
    """Seed the global random generators as `seeded` does, but for those of devices, which go on as they are.

    Args:
        seed: the seed, which numpy takes modulo 2**32.
    """
    with preserve_random_state():
        torch.default_generator.manual_seed(seed)
        _seed_others(seed)
        yield


def _seed_others(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)


def python_generators() -> tuple[Any, ...]:
    """Return the states of the global generators of Python and numpy, to be compared."""
    return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))


def random_generators() -> tuple[Any, ...]:
    """Return the states of the global CPU generators of torch, Python and numpy, to be compared."""
    return torch.get_rng_state().numpy().tobytes(), *python_generators()

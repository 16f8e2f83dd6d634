"""Feeds: in which order samples come, where an epoch is taken up again, and how many batches are held."""

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lowmem_pnn.chain import TensorSpec
from lowmem_pnn.feeds import Batch, DatasetFeed, Feed, ShardFeed
from lowmem_pnn.seeds import permutation_of, seed_of
from lowmem_pnn.sources.splits import from_torch
from lowmem_pnn.stores.activations import ActivationStore, ActivationWriter

NUM_SAMPLES = 23


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def samples() -> tuple[Tensor, Tensor]:
    """Sample k holds the number k."""
    return torch.arange(NUM_SAMPLES, dtype=torch.float32)[:, None].repeat(1, 3), torch.arange(NUM_SAMPLES) % 4


def feed_of(kind: str, folder: Path, pool: ThreadPoolExecutor, seed: int = 0) -> Feed:
    x, y = samples()
    if kind == "data set":
        return DatasetFeed(from_torch((x, y)), seed, pool, mix=False)
    if not folder.exists():
        with ActivationWriter(folder, (TensorSpec((3,), torch.float32),), NUM_SAMPLES, 100, pool) as writer:
            writer.append((x,), y)
    window = 1 << 20 if kind == "shards in memory" else 250
    return ShardFeed(ActivationStore.open(folder), seed, pool, window)


def numbers(batches: Iterator[Batch]) -> list[list[int]]:
    found = []
    for (x,), y in batches:
        assert torch.equal(x[:, 0].long() % 4, y)
        found.append(x[:, 0].int().tolist())
    return found


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


KINDS = ["data set", "shards in memory", "shards in windows"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_sample_once_in_an_order_made_of_seed_and_epoch(
    kind: str, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    feed = feed_of(kind, tmp_path / "store", pool)
    first = numbers(feed.batches(5, shuffle=True, epoch=0))
    assert [len(batch) for batch in first] == [5, 5, 5, 5, 3]
    assert sorted(flat(first)) == list(range(NUM_SAMPLES))
    assert flat(first) != list(range(NUM_SAMPLES))
    assert numbers(feed.batches(5, shuffle=True, epoch=1)) != first
    assert numbers(feed_of(kind, tmp_path / "store", pool).batches(5, shuffle=True, epoch=0)) == first
    assert numbers(feed_of(kind, tmp_path / "store", pool, seed=1).batches(5, shuffle=True, epoch=0)) != first
    feed.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("start", range(7))
def test_an_epoch_that_is_taken_up_again_gives_the_batches_that_were_left(
    kind: str, shuffle: bool, start: int, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    feed = feed_of(kind, tmp_path / "store", pool)
    whole = numbers(feed.batches(5, shuffle=shuffle, epoch=2))
    assert numbers(feed.batches(5, shuffle=shuffle, epoch=2, start=start)) == whole[start:]
    feed.close()


@pytest.mark.parametrize("kind", KINDS)
def test_without_shuffling_samples_come_in_their_own_order(kind: str, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    feed = feed_of(kind, tmp_path / "store", pool)
    assert flat(numbers(feed.batches(4, shuffle=False))) == list(range(NUM_SAMPLES))
    feed.close()


def test_the_own_order_of_training_data_is_a_fixed_mixture(pool: ThreadPoolExecutor) -> None:
    feed = DatasetFeed(from_torch(samples()), 3, pool, mix=True)
    order = flat(numbers(feed.batches(4, shuffle=False)))
    assert order == permutation_of(NUM_SAMPLES, 3, "own order").tolist() != list(range(NUM_SAMPLES))
    assert flat(numbers(feed.batches(6, shuffle=False, epoch=1))) == order


class _Held:
    """A split that knows how many of its batches are alive."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def __len__(self) -> int:
        return 40

    def batch(self, indices: object) -> tuple[Tensor, Tensor]:
        x = torch.zeros(len(np.asarray(indices)), 3)
        self.alive.add(x)
        self.most = max(self.most, len(self.alive))
        return x, torch.zeros(len(x), dtype=torch.int64)


def test_no_more_than_two_batches_are_held(pool: ThreadPoolExecutor) -> None:
    split = _Held()
    gc.collect()
    for batch in DatasetFeed(split, 0, pool, mix=False).batches(4, shuffle=True):
        del batch
    assert split.most <= 2


def test_seeds_are_the_same_everywhere() -> None:
    # They are in every run directory there is: these numbers must never change.
    assert seed_of(0, "forward", 1, 2, 3) == 7826658610484031755
    assert permutation_of(8, 0, "epoch", 0).tolist() == [3, 2, 4, 6, 5, 0, 7, 1]
    assert len({seed_of(0, "forward", part, step) for part in range(20) for step in range(50)}) == 1000
    assert all(0 <= seed_of(number) < 2**63 for number in range(100))

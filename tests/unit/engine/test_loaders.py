"""Loaders: in which order samples come and with which labels, where an epoch is taken up again, how many batches are held."""

import gc
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmem_pnn.engine.loaders import DatasetLoader, Loader, ShardLoader, SyntheticLabelLoader
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.seeds import permutation_of, seed_of
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import ActivationStore, Batch

NUM_SAMPLES = 23


def samples(num_samples: int = NUM_SAMPLES, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Sample k holds the number k."""
    x = torch.arange(num_samples, dtype=torch.float32)[:, None].repeat(1, 3)
    return x, torch.arange(num_samples) % num_classes


def loader_of(
    kind: str, folder: Path, pool: ThreadPoolExecutor, seed: int = 0, data: tuple[Tensor, Tensor] | None = None
) -> Loader:
    x, y = data or samples()
    if kind.startswith("data set"):
        return DatasetLoader(from_torch((x, y)), seed, pool, permuted=kind == "data set, mixed")
    if kind == "synthetic labels":
        # Each sample is a class of its own, whose vector holds its number.
        return SyntheticLabelLoader(from_torch((x, torch.arange(len(x)))), (x,), seed)
    if not folder.exists():
        with ActivationWriter(folder, (TensorSpec((3,), torch.float32),), len(x), 100, pool) as writer:
            writer.append((x,), y)
    window = 1 << 20 if kind == "shards in memory" else 250
    return ShardLoader(ActivationStore.open(folder), seed, pool, window)


def numbers(batches: Iterator[Batch]) -> list[list[int]]:
    found = []
    for (x,), y in batches:
        assert torch.equal(x[:, 0].long() % 4, y % 4)
        found.append(x[:, 0].int().tolist())
    return found


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


KINDS = ["data set", "shards in memory", "shards in windows", "synthetic labels"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_sample_once_in_an_order_made_of_seed_and_epoch(
    kind: str, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    loader = loader_of(kind, tmp_path / "store", pool)
    first = numbers(loader.batches(5, shuffle=True, epoch=0))
    assert [len(batch) for batch in first] == [5, 5, 5, 5, 3]
    assert sorted(flat(first)) == list(range(NUM_SAMPLES))
    assert flat(first) != list(range(NUM_SAMPLES))
    assert numbers(loader.batches(5, shuffle=True, epoch=1)) != first
    assert numbers(loader_of(kind, tmp_path / "store", pool).batches(5, shuffle=True, epoch=0)) == first
    assert numbers(loader_of(kind, tmp_path / "store", pool, seed=1).batches(5, shuffle=True, epoch=0)) != first
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("start", range(7))
def test_an_epoch_that_is_taken_up_again_gives_the_batches_that_were_left(
    kind: str, shuffle: bool, start: int, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    loader = loader_of(kind, tmp_path / "store", pool)
    whole = numbers(loader.batches(5, shuffle=shuffle, epoch=2))
    assert numbers(loader.batches(5, shuffle=shuffle, epoch=2, start=start)) == whole[start:]
    loader.close()


@pytest.mark.parametrize("kind", KINDS[:3])
def test_without_shuffling_samples_come_in_their_own_order(kind: str, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    loader = loader_of(kind, tmp_path / "store", pool)
    assert flat(numbers(loader.batches(4, shuffle=False))) == list(range(NUM_SAMPLES))
    loader.close()


def test_the_own_order_of_training_data_is_a_fixed_mixture(pool: ThreadPoolExecutor) -> None:
    loader = DatasetLoader(from_torch(samples()), 3, pool, permuted=True)
    order = flat(numbers(loader.batches(4, shuffle=False)))
    assert order == permutation_of(NUM_SAMPLES, 3, "own order").tolist() != list(range(NUM_SAMPLES))
    assert flat(numbers(loader.batches(6, shuffle=False, epoch=1))) == order


@pytest.mark.parametrize("shuffle", [True, False])
def test_synthetic_labels_come_in_the_order_of_the_training_data(shuffle: bool, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    vectors, data = (loader_of(kind, tmp_path, pool, seed=7) for kind in ("synthetic labels", "data set, mixed"))
    for epoch in range(3):
        orders = [numbers(loader.batches(5, shuffle=shuffle, epoch=epoch)) for loader in (vectors, data)]
        assert orders[0] == orders[1]


def test_every_tensor_of_a_boundary_has_its_class_vectors() -> None:
    x, y = samples()
    vectors = torch.arange(4.0)[:, None], torch.arange(8.0).view(4, 2)
    batches = list(SyntheticLabelLoader(from_torch((x, y)), vectors, 0).batches(10, shuffle=True))
    assert [len(labels) for _, labels in batches] == [10, 10, 3]
    for (one, two), labels in batches:
        assert torch.equal(one[:, 0], labels.float())
        assert torch.equal(two, torch.stack([2.0 * labels, 2.0 * labels + 1], 1))
    assert sorted(label for _, labels in batches for label in labels.tolist()) == sorted(y.tolist())


@given(
    st.sampled_from([*KINDS, "data set, mixed"]),
    st.integers(1, 150),
    st.integers(1, 40),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 3), min_size=150, max_size=150),
)
@settings(deadline=None, max_examples=40)
def test_every_sample_has_its_own_label_in_every_order(
    kind: str, num_samples: int, batch_size: int, seed: int, labels: list[int]
) -> None:
    x, y = samples(num_samples)[0], torch.tensor(labels[:num_samples])
    y[0] = 3  # of four classes
    with ThreadPoolExecutor(1) as pool, tempfile.TemporaryDirectory() as folder:
        loader = loader_of(kind, Path(folder, "store"), pool, seed, (x, y))
        assert loader.num_samples == num_samples
        orders: dict[bool, list[list[int]]] = {True: [], False: []}
        for shuffle in orders:
            for epoch in range(3):
                batches = [(held[0], given) for held, given in loader.batches(batch_size, shuffle=shuffle, epoch=epoch)]
                order = torch.cat([held[:, 0] for held, _ in batches]).long()
                found = torch.cat([given for _, given in batches])
                assert torch.equal(found, order if kind == "synthetic labels" else y[order])
                orders[shuffle].append(order.tolist())
        loader.close()
    assert all(sorted(order) == list(range(num_samples)) for order in orders[True] + orders[False])
    assert orders[False][0] == orders[False][1] == orders[False][2]
    if num_samples >= 30:
        assert len({tuple(order) for order in orders[True]}) == 3


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
    for batch in DatasetLoader(split, 0, pool, permuted=False).batches(4, shuffle=True):
        del batch
    assert split.most <= 2


def test_seeds_are_the_same_everywhere() -> None:
    # They are in every run directory there is: these numbers must never change.
    assert seed_of(0, "forward", 1, 2, 3) == 7826658610484031755
    assert permutation_of(8, 0, "epoch", 0).tolist() == [3, 2, 4, 6, 5, 0, 7, 1]
    assert len({seed_of(0, "forward", part, step) for part in range(20) for step in range(50)}) == 1000
    assert all(0 <= seed_of(number) < 2**63 for number in range(100))

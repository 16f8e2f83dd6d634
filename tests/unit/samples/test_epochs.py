"""Epochs: whole batches alone, or what a sampler draws; as a function of seed and epoch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler, Sampler, WeightedRandomSampler

from helpers.datasets import numbered
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.samples.epochs import EpochSampler, all_samples, as_epochs, epoch_order, training_order
from lowmem_pnn.seeds import random_generators, seed_of, seeded
from lowmem_pnn.sources.subsets import RenumberedSplit, as_floats, labels_of, subset

WEIGHTS = [float(number % 4) for number in range(10)]


class Own(Sampler[int]):
    def __init__(self, found: Any, length: int = 4) -> None:
        self.found, self.length, self.epochs = found, length, list[int]()

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.found() if callable(self.found) else self.found)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def test_an_epoch_leaves_out_what_makes_no_whole_batch() -> None:
    whole = numbered(10)
    for split in (
        as_epochs(whole, 4, None),
        RenumberedSplit(as_epochs(whole, 4, None), torch.arange(10)),
        as_floats(as_epochs(whole, 4, None)),
    ):
        assert (len(split), all_samples(split)) == (8, 10)
        for shuffle in (True, False):
            order = epoch_order(split, 3, "epoch", 1, shuffle=shuffle)
            assert order.tolist() == training_order(10, 3, "epoch", 1, shuffle=shuffle)[:8].tolist()
        assert split.batch([9])[1].tolist() == labels_of(split, np.array([9])).tolist() == [9]
    assert as_epochs(whole, 5, None) is whole
    with pytest.raises(
        DataError,
        match=r"^--drop-last: 10 training samples make no batch of 11; give --batch-size 10 at most, or leave the option out$",
    ):
        as_epochs(whole, 11, None)


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler(WEIGHTS, 23),
        WeightedRandomSampler(WEIGHTS, 5, replacement=False, generator=torch.Generator().manual_seed(1)),
        RandomSampler(range(10), replacement=True, num_samples=6),
        Own(lambda: np.random.permutation(10)[:4]),
    ],
)
def test_a_sampler_draws_by_seed_and_epoch(sampler: Any) -> None:
    before = random_generators()
    epochs = EpochSampler(sampler, 10, "a")
    # Training samples come in a permutation of the data set's.
    numbers = np.random.RandomState(0).permutation(10)
    split = as_epochs(subset(numbered(10), numbers), None, epochs)
    assert len(split) == len(sampler)
    orders = [epoch_order(split, 5, "epoch", epoch, shuffle=True) for epoch in (0, 1, 0)]
    assert random_generators() == before
    assert orders[0].tolist() == orders[2].tolist() != orders[1].tolist()
    with seeded(seed_of(5, "sampler", "epoch", 1)):
        if getattr(sampler, "generator", None) is not None:
            sampler.generator = None
        expected = [int(index) for index in sampler]
    assert split.batch(orders[1])[1].tolist() == numbers[orders[1]].tolist() == expected
    assert (len(as_epochs(subset(numbered(10), numbers), 4, epochs)), all_samples(split)) == (len(sampler) // 4 * 4, 10)


def test_a_sampler_is_told_the_epoch() -> None:
    sampler = Own([0, 1, 2, 3])
    EpochSampler(sampler, 10, "a").indices(0, "epoch", 7)
    assert sampler.epochs[-1] == 7


GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Own([1, 2]), "a: the Own gives 2 indices from 1 to 2, and its length is 4, of 10 samples; give as many as it says, from 0 to 9"),
        (Own([10], 1), "a: the Own gives 1 indices from 10 to 10, and its length is 1, of 10 samples; give as many as it says, from 0 to 9"),
        (Own([], 0), "a: the Own gives 0 indices, and its length is 0, of 10 samples; give as many as it says, from 0 to 9"),
        (Own(lambda: 1 / 0), "a: the Own fails: ZeroDivisionError: division by zero; see to it"),
        (
            Own(lambda: GENERATOR.permutation(10)[:4]),
            "a: the Own draws others after the same seed of torch, numpy and Python's random; have it draw from one of these",
        ),
        (
            Own([1], "4"),  # type: ignore[arg-type]
            "a: the length of the Own cannot be told: TypeError: 'str' object cannot be interpreted as an integer; give it one",
        ),
    ],
)  # fmt: skip
def test_samplers_that_cannot_be_followed_are_refused(sampler: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        EpochSampler(sampler, 10, "a")
    assert str(error.value) == message


def test_a_sampler_needs_all_samples() -> None:
    epochs = EpochSampler(Own([0, 1, 2, 3]), 10, "a")
    epochs.check(10)
    with pytest.raises(
        ConfigError,
        match=r"^a: the Own draws from 10 samples, of which 9 are left to train on; give data to validate and test on",
    ):
        epochs.check(9)

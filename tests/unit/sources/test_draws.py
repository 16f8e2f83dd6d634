"""Draws: what a data set draws at random follows from a key and the sample's number, and leaves everybody else's generators alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from helpers.datasets import Drawn, Pairs, everything
from lowmem_pnn.errors import DataError
from lowmem_pnn.seeds import random_generators, seed_of, seeded
from lowmem_pnn.sources.draws import FIXED, SampleReader
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.subsets import RenumberedSplit, reads_alone, subset

ITEMS = [(torch.arange(3.0) + number, number % 2) for number in range(20)]
KEY = (7, "sample", "epoch", 1)


class Own(Pairs):
    """Data that changes its samples by a function of its own."""

    def __init__(self, change: Callable[[Any, int], Any]) -> None:
        super().__init__(ITEMS)
        self.change, self.reads = change, 0

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        x, label = super().__getitem__(index)
        return self.change(x, index), label


class Doubled(Pairs):
    """Samples of two tensors."""

    def __getitem__(self, index: int) -> Any:
        x, label = self.items[index]
        return (x, x), label


def seeds_itself(x: Any, index: int) -> Any:
    torch.manual_seed(index)
    return x + torch.rand(3)


def puts_back(x: Any, _: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        return x + torch.rand(3)


def rarely(x: Any, _: int) -> Any:
    return x.flip(0) if torch.rand(()) < 1e-9 else x


@pytest.mark.parametrize(
    ("change", "is_random", "uses_generators"),
    [
        (lambda x, _: x, False, False),
        (lambda x, _: x + np.random.rand(), True, True),
        (rarely, True, True),
        (puts_back, True, True),
        (seeds_itself, False, True),
        (lambda x, index: 1 / 0 if index == 19 else x, False, False),
    ],
    ids=["fixed", "random", "rarely", "puts back", "seeds itself", "fails"],
)
def test_what_draws_is_noticed_by_the_generators_too(change: Any, is_random: bool, uses_generators: bool) -> None:
    before = random_generators()
    reader = SampleReader(Own(change), len(ITEMS))
    assert (reader.is_random, reader.uses_generators) == (is_random, uses_generators)
    reader.read(3, KEY)
    assert random_generators() == before


def test_what_is_drawn_at_the_first_reading_of_all_is_no_random_transform() -> None:
    dataset = Own(lambda x, _: x)
    dataset.change = lambda x, _: x if dataset.reads > 1 else x + 0 * torch.rand(())
    assert not SampleReader(dataset, len(ITEMS)).uses_generators


@pytest.mark.parametrize("way", ["counted", "listed", "part of a list", "structured", "skip broken"])
def test_one_class_that_draws_alone_is_noticed(way: str) -> None:
    # Only the one sample of a rare class, which no evenly spaced one is.
    dataset: Any = Own(lambda x, index: x + torch.rand(3) if index == 51 else x)
    dataset.items = [(torch.arange(3.0) + number, int(number == 51)) for number in range(100)]
    if "list" in way:
        dataset.targets = [label for _, label in dataset.items]
    if way == "part of a list":
        dataset = torch.utils.data.Subset(dataset, range(2, 100))
    if way == "structured":
        dataset = Doubled(dataset)
    before = random_generators()
    split = from_torch(dataset, num_classes=2 if way == "skip broken" else None, skip_broken=way == "skip broken")
    assert (split.is_random, split.uses_generators) == (True, True)
    assert random_generators() == before


@pytest.mark.parametrize("structured", [False, True])
def test_samples_are_as_after_seeding_by_hand(structured: bool) -> None:
    items = [({"a": x, "b": x}, label) for x, label in ITEMS] if structured else ITEMS

    class Two(Drawn):
        def __getitem__(self, index: int) -> Any:
            parts, label = self.items[index]
            return ({name: x + torch.rand(1) for name, x in parts.items()}, label) if structured else super().__getitem__(index)

    dataset: Any = Two(items)
    whole = from_torch(dataset)
    split = RenumberedSplit(subset(whole, np.array([7, 3, 3])), torch.arange(2))
    assert (whole.is_random, reads_alone(split)) == (True, True)
    for key in (KEY, (7, "sample", "epoch", 2), FIXED):
        x = split.batch([2, 0], None if key is FIXED else key)[0]
        for row, number in enumerate((3, 7)):
            with seeded(seed_of(*key, number)):
                sample = dataset[number][0]
            for one, other in zip(x, sample.values(), strict=True) if structured else [(x, sample)]:
                assert torch.equal(one[row], other)
    first, other = (split.batch([0], key)[0][0] for key in (KEY, (8, *KEY[1:])))
    assert not torch.equal(first, other)


def test_a_hash_of_what_is_drawn_is_the_same_in_every_process() -> None:
    assert from_torch(Drawn(ITEMS)).fingerprint() == from_torch(Drawn(ITEMS)).fingerprint()
    assert torch.equal(*(everything(from_torch(Drawn(ITEMS)))[0] for _ in range(2)))


def test_generators_of_a_data_set_are_not_seeded_and_refused() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(DataError) as error:
        from_torch(Own(lambda x, _: x + generator.random()), where="a").fingerprint()
    assert str(error.value) == (
        "sample 0 of a differs when it is read again, with the generators of torch, numpy and Python's random seeded alike; have its random "
        "transforms draw from one of these, or take them out of the data set"
    )

"""Subsets: samples chosen by chance, and integers as numbers."""

import numpy as np
import pytest
import torch

from helpers.datasets import everything, numbered
from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.subsets import as_floats, sample_of, subset


def test_a_limit_takes_samples_by_chance_in_their_order() -> None:
    whole = numbered(400)
    chosen = everything(sample_of(whole, 100, seed=3))[1]
    assert len(set(chosen.tolist())) == 100
    assert torch.equal(chosen, chosen.sort().values)
    assert [int(((chosen >= begin) & (chosen < begin + 100)).sum()) for begin in range(0, 400, 100)] == [26, 27, 22, 25]
    assert torch.equal(everything(sample_of(whole, 100, seed=3))[1], chosen)
    assert not torch.equal(everything(sample_of(whole, 100, seed=4))[1], chosen)


def test_the_choice_of_a_seed_stays_for_good() -> None:
    assert everything(sample_of(numbered(12), 4, seed=5))[1].tolist() == [2, 5, 7, 9]


@pytest.mark.parametrize("limit", [None, 12, 99])
def test_without_a_limit_below_the_length_all_are_taken(limit: int | None) -> None:
    assert everything(sample_of(numbered(12), limit, seed=5))[1].tolist() == list(range(12))


def test_no_sample_is_no_choice() -> None:
    with pytest.raises(DataError, match="a subset of 0 of 12 samples"):
        sample_of(numbered(12), 0, seed=0)


def test_integers_as_floats() -> None:
    x = torch.arange(12).reshape(6, 2)
    split = from_torch((x, torch.arange(6)))
    part = subset(split, np.array([4, 1]))
    floats = as_floats(part)
    assert torch.equal(floats.batch([0, 1])[0], x[[4, 1]].float())
    assert part.batch([0])[0].dtype == torch.int64
    assert split.preprocessing.steps == ("int64 as it is",)
    whole = as_floats(split)
    assert whole.preprocessing.steps == ("int64 to float32",)  # type: ignore[attr-defined]

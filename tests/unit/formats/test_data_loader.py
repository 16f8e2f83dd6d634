"""Data loaders: what is taken of them, and what is refused instead of being dropped."""

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from helpers.datasets import Pairs, everything
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.formats.data_loader import loader_options, own_sampler, without_loader
from lowmem_pnn.sources.map_split import from_torch

DATA = Pairs([(torch.tensor([float(number)]), number % 3) for number in range(10)])


def as_dicts(items: list[Any]) -> dict[str, torch.Tensor]:
    x, y = default_collate(items)
    return {"image": x * 2, "label": y + 1}


def padded(items: list[Any]) -> Any:
    length = 2 + len(items)
    return torch.zeros(len(items), length), torch.tensor([label for _, label in items])


def mixed(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return x.mean(0, keepdim=True).expand_as(x), y


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(DATA)


@pytest.mark.parametrize(
    ("loader", "options"),
    [
        (DataLoader(DATA, batch_size=4), {"batch_size": 4, "shuffle": False}),
        (DataLoader(DATA, batch_size=5, shuffle=True, drop_last=True), {"batch_size": 5, "drop_last": True}),
        (DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler([1.0] * 10, 10)), {"batch_size": 4, "val_fraction": 0.0}),
        (DataLoader(DATA, batch_size=4, sampler=SequentialSampler(range(6))), {"batch_size": 4, "val_fraction": 0.0}),
        (DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler([1, 3])), {"batch_size": 4}),
        (DataLoader(Stream(), batch_size=4), {"batch_size": 4, "val_fraction": 0.0}),
        (DATA, {}),
    ],
)
def test_batch_size_and_order_are_taken(loader: Any, options: dict[str, Any]) -> None:
    assert loader_options(loader) == options


def test_a_sampler_derived_from_one_of_a_subset_draws_by_indices_of_all_samples() -> None:
    class Every(SubsetRandomSampler):
        pass

    loader = DataLoader(DATA, batch_size=2, sampler=Every([7, 2, 5]))
    assert own_sampler(loader) is loader.sampler
    assert without_loader(loader, "a", trains=True) is DATA


def test_the_data_set_is_taken() -> None:
    assert without_loader(DataLoader(DATA, batch_size=4, shuffle=True), "a") is DATA
    assert without_loader(DATA, "a") is DATA
    chosen = without_loader(DataLoader(DATA, batch_size=2, sampler=SubsetRandomSampler([7, 2, 5])), "a")
    assert everything(from_torch(chosen))[0][:, 0].tolist() == [7, 2, 5]


def test_collation_is_taken() -> None:
    loader = DataLoader(DATA, batch_size=10, collate_fn=as_dicts)
    x, y = everything(from_torch(without_loader(loader, "a")))
    (expected,) = loader
    assert torch.equal(x, expected["image"])
    assert torch.equal(y, expected["label"])


def test_a_short_last_batch_is_left_out_where_it_is_known_which() -> None:
    loader: Any = DataLoader(DATA, batch_size=4, drop_last=True)
    assert len(without_loader(loader, "a")) == 8
    assert without_loader(loader, "a", trains=True) is DATA


def test_own_samplers_draw_training_samples() -> None:
    # The last leaves samples out.
    for sampler in (WeightedRandomSampler([1.0] * 10, 10), SequentialSampler(range(6))):
        loader: Any = DataLoader(DATA, batch_size=4, sampler=sampler)
        assert without_loader(loader, "a", trains=True) is DATA
        assert own_sampler(loader) is sampler
    for other in (DATA, DataLoader(DATA, shuffle=True), DataLoader(DATA), DataLoader(DATA, sampler=SubsetRandomSampler([1]))):
        assert own_sampler(other) is None


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler([1.0] * 10, 10)),
            r"a is a DataLoader with a WeightedRandomSampler, and all samples are measured, once each; give one with shuffle=False, or",
        ),
        (
            DataLoader(DATA, batch_size=4, sampler=SequentialSampler(range(6))),
            r"a is a DataLoader with a SequentialSampler, and all samples are measured, once each; give one with shuffle=False, or its",
        ),
        (
            DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, num_samples=4)),
            r"a is a DataLoader with a RandomSampler, and all samples are measured, once each",
        ),
        (
            DataLoader(DATA, batch_size=None),
            r"a is a DataLoader with no batches, and batches are made here; give one with batch_size",
        ),
        (
            DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 4, False)),
            r"a is a DataLoader with batches by a BatchSampler, and batches are made here",
        ),
        (
            DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True),
            r"a is a DataLoader that leaves out 2 samples by chance \(shuffle=True, drop_last=True\), and all are measured here; give drop",
        ),
        (
            DataLoader(Stream(), batch_size=4),
            r"a: the loader's data set is an IterableDataset \(Stream\), a stream; give a map-style",
        ),
        (
            DataLoader(DATA, batch_size=4, collate_fn=padded),
            r"a: collate_fn gives other values for two samples together than for each",
        ),
        (
            DataLoader(DATA, batch_size=4, collate_fn=mixed),
            r"a: collate_fn gives other values for two samples together than for each",
        ),
        (
            DataLoader(DATA, batch_size=4, collate_fn=lambda items: items),
            r"a: collate_fn makes \(1,\), int of 1 samples; have",
        ),
        (
            DataLoader(DATA, batch_size=4, collate_fn=lambda items: 1 / 0),
            r"a: collate_fn fails: ZeroDivisionError: division by zero; see to",
        ),
    ],
)
def test_what_would_be_dropped_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        without_loader(loader, "a")


def test_a_part_is_named_once() -> None:
    import lowmem_pnn

    with pytest.raises(ConfigError, match=r"^val_data is the name of a data set; give an object as val=$"):
        lowmem_pnn.fit("mlp:64-10", "digits", val_data=(1, 2), max_gpu_mem="1GB")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^val and val_data both name a part of the data; give one$"):
        lowmem_pnn.fit("mlp:64-10", "digits", "digits", val_data="digits", max_gpu_mem="1GB")

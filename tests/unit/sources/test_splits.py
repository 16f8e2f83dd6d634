"""Splits: batches, what they refuse, division into parts, and data sets given from Python."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, Subset, TensorDataset

from helpers.datasets import Pairs, everything, numbered, token_windows
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.sources.datasets import make_dataset
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.subsets import subset, train_val_split
from lowmem_pnn.sources.targets import TargetOptions


def test_a_batch_is_the_callers_own() -> None:
    x = torch.rand(4, 3)
    before = x.clone()
    split = from_torch((x, torch.arange(4)))
    found, labels = split.batch([0, 1, 2, 3])
    found.zero_()
    labels.zero_()
    assert torch.equal(x, before)
    assert split.batch([3])[1].item() == 3


def test_a_batch_is_aligned_for_compute() -> None:
    split = from_torch((np.random.rand(50, 3).astype(np.float32), np.arange(50)))
    assert all(split.batch(range(size))[0].data_ptr() % 64 == 0 for size in (1, 2, 3, 49))


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "an infinite value"), (1e300, "an infinite value")]
)
def test_a_value_that_cannot_be_trained_on_is_named(value: float, word: str) -> None:
    x = torch.zeros(9, 2, dtype=torch.float64)
    x[7, 1] = value
    split = from_torch((x, torch.arange(9)), where="mine")
    split.batch([0, 6, 8])
    with pytest.raises(DataError, match=rf"sample 7 of mine holds {word}; repair it or leave it out \(--skip-broken\)$"):
        split.batch([0, 7])


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_that_is_no_class_is_named(label: int) -> None:
    y = torch.tensor([0, 1, label, 2])
    split = from_torch((torch.zeros(4, 2), y), num_classes=4, where="mine")
    with pytest.raises(DataError, match=rf"sample 2 of mine has label {label}, outside 0 to 3 \(4 classes\); number the classes"):
        subset(split, np.array([3, 2])).batch([1])


@pytest.mark.parametrize("indices", [[], [4], [-1], [[0]], [0.5]])
def test_indices_out_of_range_are_refused(indices: Any) -> None:
    split = numbered(4)
    for each in (split, subset(split, np.arange(4))):
        with pytest.raises(IndexError, match="indices"):
            each.batch(indices)


@given(st.integers(1, 60), st.floats(0, 0.95), st.integers(0, 2**40), st.none() | st.integers(1, 80))
def test_train_and_val_are_disjoint_and_cover(length: int, fraction: float, seed: int, limit: int | None) -> None:
    whole = numbered(length)
    total = min(length, limit or length)
    if max(round(total * fraction), 1 if fraction else 0) >= total:
        with pytest.raises(DataError, match="leaves none to train on"):
            train_val_split(whole, fraction, seed, limit)
        return
    train, val = train_val_split(whole, fraction, seed, limit)
    parts = [everything(part)[1].tolist() for part in (train, val) if part is not None]
    assert (val is None) == (fraction == 0)
    together = [label for part in parts for label in part]
    assert len(together) == len(set(together)) == total
    again, _ = train_val_split(whole, fraction, seed, limit)
    assert everything(again)[1].tolist() == parts[0]


def test_another_seed_divides_otherwise_and_a_limit_takes_the_first() -> None:
    whole = numbered(100)
    order = [everything(train_val_split(whole, 0, seed, None)[0])[1].tolist() for seed in (0, 1)]
    assert order[0] != order[1]
    assert everything(train_val_split(whole, 0, 0, 10)[0])[1].tolist() == order[0][:10]


def test_the_division_of_a_seed_stays_for_good() -> None:
    train, val = train_val_split(numbered(8), 0.25, seed=3, limit=None)
    assert val is not None
    assert (everything(train)[1].tolist(), everything(val)[1].tolist()) == ([5, 7, 4, 6, 3, 1], [0, 2])


@pytest.mark.parametrize(
    ("fraction", "seed", "limit", "message"),
    [
        (1.0, 0, None, r"a validation fraction of 1.0 is not in 0 <= fraction < 1"),
        (-0.1, 0, None, r"a validation fraction of -0.1 is not in"),
        (0.1, 0, 0, r"a limit of 0 samples leaves none"),
        (0.1, -1, None, r"a seed of -1 is negative"),
    ],
)
def test_bad_divisions_are_refused(fraction: float, seed: int, limit: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_val_split(numbered(8), fraction, seed, limit)


def test_subsets_of_subsets() -> None:
    inner = subset(subset(numbered(10), np.array([9, 5, 1, 5])), np.array([1, 2, 1]))
    x, labels = everything(inner)
    assert labels.tolist() == x.flatten().tolist() == [5, 1, 5]
    with pytest.raises(DataError, match="a subset of 0 of 10 samples"):
        subset(numbered(10), np.array([], dtype=np.int64))
    with pytest.raises(IndexError, match="give 0 to 9"):
        subset(numbered(10), np.array([10]))


def test_the_number_of_classes_is_found_without_reading_samples() -> None:
    class Unreadable(Pairs):
        def __getitem__(self, index: int) -> Any:
            assert index == 0, "only the first sample tells the shape"
            return torch.zeros(2), 0

    with_classes, with_targets = Unreadable([0, 0]), Unreadable([0, 0])
    with_classes.classes = ["cat", "dog", "eel"]  # type: ignore[attr-defined]
    with_targets.targets = [0, 5]  # type: ignore[attr-defined]
    assert from_torch(with_classes).num_classes == 3
    assert from_torch(with_targets).num_classes == 6
    assert from_torch(Subset(with_targets, [0])).num_classes == 6
    assert from_torch(TensorDataset(torch.zeros(3, 2), torch.tensor([0, 4, 1]))).num_classes == 5
    with_targets.targets = [0, 1, 255]  # type: ignore[attr-defined]
    for ignoring in (with_targets, TensorDataset(torch.zeros(3, 2), torch.tensor([0, 255, 1])), (np.eye(3), [0, 255, 1])):
        assert from_torch(ignoring, options=TargetOptions(ignored=255)).num_classes == 2
    tokens = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[2, 3], [0, 90]])
    for kind in (tuple, lambda parts: TensorDataset(*parts)):
        assert from_torch(kind(tokens), options=TargetOptions(ignored=90)).num_classes == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Pairs([]), r"the data set is empty: it holds 0 samples"),
        ((torch.zeros(0, 3), torch.zeros(0)), r"the data set is empty"),
        ((torch.zeros(3, 3), torch.zeros(2)), r"3 samples but 2 labels"),
        (
            (torch.zeros(3, 3), torch.eye(3)),
            r"labels have shape \(3, 3\), with one-hot rows; give one class number for each sample \(one-hot: argmax\)",
        ),
        ((torch.zeros(3, 4).long(), torch.zeros(3, 3).long()), r"labels have shape \(3, 3\), and .* of one shape \(N, T\);"),
        ((torch.zeros(3, 4).byte(), torch.full((3, 4), 2)), r"labels have shape \(3, 4\); give one class number for each sample"),
        ((torch.zeros(3, 4).long(), torch.zeros(3, 4)), r"labels have shape \(3, 4\), and .* integer samples and labels"),
        (
            Pairs([(torch.zeros(4).long(), torch.zeros(3).long())]),
            r"labels have shape \(1, 3\), and samples are integers of shape \(4,\); give one class number",
        ),
        (
            (torch.zeros(3, 3), torch.tensor([0, 5e4, 1])),
            r"targets are whole floats up to 50000, .* say which: --task regression or",
        ),
        ((torch.zeros(3, 0), torch.zeros(3)), r"samples of shape \(0,\) hold no values"),
        ((torch.zeros(3, 2, dtype=torch.complex64), torch.zeros(3)), r"samples are complex64; give real numbers"),
        ((np.array([["a"], ["b"]]), np.zeros(2)), r"holds values of dtype <U1; give real numbers"),
        (Pairs([torch.zeros(3)]), r"sample 0 of the data set is a Tensor; a data set must give pairs"),
        (Pairs([(torch.zeros(3), 1, 2)]), r"sample 0 of the data set is 3 values; a data set must give pairs"),
        (Pairs([(torch.zeros(3), "cat")]), r"the labels of sample 0 of the data set holds? a str"),
        (Pairs([(torch.zeros(3), torch.eye(3)[0])]), r"with one-hot rows; give one class number for each sample"),
        (iter([]), r"without __getitem__ and __len__; give a map-style data set"),
    ],
)
def test_what_is_no_data_set_is_said(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        from_torch(data)
    assert "\n" not in str(raised.value)


def test_a_stream_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(torch.zeros(2), 0)])

    with pytest.raises(DataError, match=r"give a map-style data set"):
        from_torch(Stream())


def test_samples_of_two_shapes_are_named() -> None:
    split = from_torch(Pairs([(torch.zeros(3), 0), (torch.zeros(4), 1)]), where="mine")
    with pytest.raises(DataError, match=r"sample 1 of mine is \(4,\) torch.float32, sample 0 is \(3,\) torch.float32; give all"):
        split.batch([0, 1])


@pytest.mark.parametrize(
    "kind", [tuple, lambda parts: TensorDataset(*parts), lambda parts: Pairs(list(zip(*parts, strict=True)))]
)
def test_classes_of_tokens_are_those_of_both(kind: Any) -> None:
    x, y = token_windows()
    high = x.clone()
    high[2, 1] = 90
    assert from_torch(kind((high, y))).num_classes == 91
    assert make_dataset(kind((x, y)), kind((high, y)), name="x").num_classes == 91
    assert make_dataset(kind((x, y)), name="x", num_classes=256).num_classes == 256
    # A label for the whole sample says nothing of the tokens, as it was.
    assert from_torch(kind((high, torch.tensor([0, 1, 1, 0, 2, 0])))).num_classes == 3


@pytest.mark.parametrize("kind", [tuple, lambda parts: TensorDataset(*parts)])
@pytest.mark.parametrize(("part", "value", "word"), [(0, 30, "token"), (0, -1, "token"), (1, 25, "label"), (1, -1, "label")])
def test_a_token_that_is_no_class_is_named(kind: Any, part: int, value: int, word: str) -> None:
    parts = token_windows()
    parts[part][3, 2] = value
    split = from_torch(kind(parts), num_classes=25, where="mine")
    split.batch([0, 2, 5])
    with pytest.raises(
        DataError, match=rf"sample 3 of mine has {word} {value}, outside 0 to 24 \(25 classes\); number the classes"
    ):
        split.batch([5, 3])


class Folders(Pairs):
    """Map-style data with names of classes, as torchvision's have them."""

    def __init__(self, classes: list[str], target_transform: Any = None) -> None:
        super().__init__([(torch.zeros(2), number) for number in range(len(classes))])
        self.classes, self.targets, self.target_transform = classes, list(range(len(classes))), target_transform

    def __getitem__(self, index: int) -> Any:
        x, label = self.items[index]
        return x, label if self.target_transform is None else self.target_transform(label)


def test_classes_of_map_style_data_have_their_names_and_parts_number_them_alike() -> None:
    train = Folders(["ant", "bee", "cat"])
    assert make_dataset(train, Subset(train, [1]), name="x").classes == ("ant", "bee", "cat")
    assert make_dataset(train, Folders(["ant", "bee"]), name="x").num_classes == 3
    assert make_dataset(train, (torch.zeros(2, 2), [0, 2]), name="x").classes == ("ant", "bee", "cat")
    for part in ("test", "val"):
        with pytest.raises(
            DataError, match=r"class 1 is 'bee' in the training part and 'cat' in the (test|validation) part; number"
        ):
            make_dataset(train, name="x", **{part: Folders(["ant", "cat"])})


def test_targets_that_a_data_set_changes_are_counted() -> None:
    train = Folders([f"class {number}" for number in range(10)], lambda label: label // 5)
    for data in (train, Subset(train, [0, 9])):
        dataset = make_dataset(data, name="x")
        assert (dataset.num_classes, dataset.classes) == (2, ())

"""Data sets by name and from Python: what the model sees, how they are divided, and what is refused."""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, Subset, TensorDataset

from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.sources.arrays import hash_tensor
from lowmem_pnn.sources.datasets import Dataset, find_dataset, from_torch, make_dataset, subset, train_val

NOWHERE = Path("no-such-root")


def numbered(length: int) -> Any:
    """A split whose sample i holds i, of class i."""
    return from_torch((torch.arange(float(length)).reshape(-1, 1), torch.arange(length)))


def everything(split: Any) -> tuple[Tensor, Tensor]:
    return split.batch(range(len(split)))


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


def images(shape: tuple[int, ...], num: int = 6) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (num, *shape)).astype(np.uint8)


# ---- presentation


@pytest.mark.parametrize(
    ("raw", "wants", "shape", "words"),
    [
        ((4, 5), "any", (1, 4, 5), "uint8 / 255, HW to CHW"),
        ((4, 5), "flat", (20,), "uint8 / 255, HW to CHW, flattened"),
        ((4, 5), "image3", (3, 4, 5), "uint8 / 255, HW to CHW, grey repeated to 3 channels"),
        ((4, 5, 3), "any", (3, 4, 5), "uint8 / 255, HWC to CHW"),
        ((4, 5, 3), "flat", (60,), "uint8 / 255, HWC to CHW, flattened"),
        ((4, 5, 3), "image3", (3, 4, 5), "uint8 / 255, HWC to CHW"),
        ((4, 5, 1), "image3", (3, 4, 5), "uint8 / 255, HWC to CHW, grey repeated to 3 channels"),
        ((3, 4, 5), "image3", (3, 4, 5), "uint8 / 255"),
        ((1, 4, 5), "any", (1, 4, 5), "uint8 / 255"),
        ((7,), "flat", (7,), "uint8 / 255"),
    ],
)
def test_bytes_are_presented_as_images(
    raw: tuple[int, ...], wants: Any, shape: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    x = images(raw)
    dataset = find_dataset(save(tmp_path / "a.npz", x_train=x, y_train=np.arange(6)), NOWHERE, wants)
    found, _ = dataset.train.batch([3, 1])
    expected = torch.from_numpy(x[[3, 1]]).float().div(255)
    if "HWC" in words:
        expected = expected.permute(0, 3, 1, 2)
    if "repeated" in words:
        expected = expected.reshape(2, 1, 4, 5).repeat(1, 3, 1, 1)
    assert torch.equal(found, expected.reshape(2, *shape))
    assert found.is_contiguous()
    assert (dataset.sample_shape, dataset.dtype, dataset.preprocessing) == (shape, torch.float32, words)


def test_bytes_are_as_torchvision_presents_them() -> None:
    from torchvision.transforms.functional import to_tensor

    x = images((8, 9, 3))
    found, _ = from_torch((x, np.arange(6))).batch([2])
    assert torch.equal(found[0], to_tensor(x[2]))


@pytest.mark.parametrize(
    ("dtype", "wants", "shape", "expected_shape", "expected_dtype"),
    [
        (torch.float32, "any", (4, 5), (4, 5), torch.float32),
        (torch.float32, "any", (4, 5, 3), (4, 5, 3), torch.float32),
        (torch.float64, "flat", (4, 5), (20,), torch.float32),
        (torch.float16, "image3", (4, 5), (3, 4, 5), torch.float32),
        (torch.float32, "image3", (4, 5, 3), (3, 4, 5), torch.float32),
        (torch.float32, "image3", (3, 3, 3), (3, 3, 3), torch.float32),
        (torch.int64, "any", (7,), (7,), torch.int64),
        (torch.int32, "any", (7,), (7,), torch.int64),
        (torch.int64, "flat", (7,), (7,), torch.float32),
        (torch.bool, "any", (7,), (7,), torch.float32),
    ],
)
def test_other_numbers_keep_their_values(
    dtype: torch.dtype, wants: Any, shape: tuple[int, ...], expected_shape: tuple[int, ...], expected_dtype: torch.dtype
) -> None:
    x = torch.arange(6 * int(np.prod(shape))).reshape(6, *shape).to(dtype)
    dataset = make_dataset((x, torch.arange(6)), name="numbers", wants=wants)
    found, _ = everything(dataset.train)
    assert (found.shape[1:], found.dtype) == (expected_shape, expected_dtype)
    assert (dataset.sample_shape, dataset.dtype) == (expected_shape, expected_dtype)
    if shape == expected_shape:
        assert torch.equal(found, x.to(expected_dtype))


@pytest.mark.parametrize("shape", [(7,), (4, 5, 4), (2, 3, 4, 5)])
def test_what_is_no_image_is_refused_where_images_are_wanted(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"samples have shape \(.*\), but the model takes images of three channels; give images"):
        from_torch((images(shape), np.arange(6)), wants="image3")


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


# ---- what a batch refuses


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "an infinite value"), (1e300, "an infinite value")]
)
def test_a_value_that_cannot_be_trained_on_is_named(value: float, word: str) -> None:
    x = torch.zeros(9, 2, dtype=torch.float64)
    x[7, 1] = value
    split = from_torch((x, torch.arange(9)), where="mine")
    split.batch([0, 6, 8])
    with pytest.raises(DataError, match=f"sample 7 of mine holds {word}; repair it or leave it out"):
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


# ---- dividing


@given(st.integers(1, 60), st.floats(0, 0.95), st.integers(0, 2**40), st.none() | st.integers(1, 80))
def test_train_and_val_are_disjoint_and_cover(length: int, fraction: float, seed: int, limit: int | None) -> None:
    whole = numbered(length)
    total = min(length, limit or length)
    if max(round(total * fraction), 1 if fraction else 0) >= total:
        with pytest.raises(DataError, match="leaves none to train on"):
            train_val(whole, fraction, seed, limit)
        return
    train, val = train_val(whole, fraction, seed, limit)
    parts = [everything(part)[1].tolist() for part in (train, val) if part is not None]
    assert (val is None) == (fraction == 0)
    together = [label for part in parts for label in part]
    assert len(together) == len(set(together)) == total
    again, _ = train_val(whole, fraction, seed, limit)
    assert everything(again)[1].tolist() == parts[0]


def test_another_seed_divides_otherwise_and_a_limit_takes_the_first() -> None:
    whole = numbered(100)
    order = [everything(train_val(whole, 0, seed, None)[0])[1].tolist() for seed in (0, 1)]
    assert order[0] != order[1]
    assert everything(train_val(whole, 0, 0, 10)[0])[1].tolist() == order[0][:10]


def test_the_division_of_a_seed_stays_for_good() -> None:
    train, val = train_val(numbered(8), 0.25, seed=3, limit=None)
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
        train_val(numbered(8), fraction, seed, limit)


def test_subsets_of_subsets() -> None:
    inner = subset(subset(numbered(10), np.array([9, 5, 1, 5])), np.array([1, 2, 1]))
    x, labels = everything(inner)
    assert labels.tolist() == x.flatten().tolist() == [5, 1, 5]
    with pytest.raises(DataError, match="a subset of 0 of 10 samples"):
        subset(numbered(10), np.array([], dtype=np.int64))
    with pytest.raises(IndexError, match="give 0 to 9"):
        subset(numbered(10), np.array([10]))


# ---- from Python


class Pairs(TorchDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_a_map_style_data_set_of_anything() -> None:
    grey = Image.fromarray(images((4, 5))[0])
    for x, shape in ((torch.rand(3), (3,)), (np.ones((2, 2)), (2, 2)), (grey, (1, 4, 5)), (3, ()), (2.5, ())):
        for label in (1, np.int64(1), torch.tensor(1), torch.tensor([1])):
            dataset = make_dataset(Pairs([(x, 0), (x, label)]), name="pairs")
            found, labels = everything(dataset.train)
            assert (found.shape, labels.tolist()) == ((2, *shape), [0, 1])
            assert dataset.num_classes == 2


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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Pairs([]), r"the data set is empty: it holds 0 samples"),
        ((torch.zeros(0, 3), torch.zeros(0)), r"the data set is empty"),
        ((torch.zeros(3, 3), torch.zeros(2)), r"3 samples but 2 labels"),
        (
            (torch.zeros(3, 3), torch.eye(3)),
            r"labels have shape \(3, 3\); give one class number for each sample \(one-hot: argmax\)",
        ),
        ((torch.zeros(3, 4).long(), torch.zeros(3, 3).long()), r"labels have shape \(3, 3\); .* of one shape \(N, T\)$"),
        ((torch.zeros(3, 4).byte(), torch.zeros(3, 4).long()), r"labels have shape \(3, 4\); .* integer samples and labels"),
        ((torch.zeros(3, 4).long(), torch.zeros(3, 4)), r"labels have shape \(3, 4\); .* integer samples and labels"),
        (
            Pairs([(torch.zeros(4).long(), torch.zeros(3).long())]),
            r"has labels of shape \(3,\); .* labels of the sample's shape$",
        ),
        ((torch.zeros(3, 3), torch.tensor([0, 0.5, 1])), r"a label is 0.5; labels are class numbers"),
        ((torch.zeros(3, 0), torch.zeros(3)), r"samples of shape \(0,\) hold no values"),
        ((torch.zeros(3, 2, dtype=torch.complex64), torch.zeros(3)), r"samples are complex64; give real numbers"),
        ((np.array([["a"], ["b"]]), np.zeros(2)), r"holds values of dtype <U1; give real numbers"),
        (Pairs([torch.zeros(3)]), r"sample 0 of the data set is a Tensor; a data set must give pairs"),
        (Pairs([(torch.zeros(3), 1, 2)]), r"sample 0 of the data set is 3 values; a data set must give pairs"),
        (Pairs([({"a": 1}, 1)]), r"sample 0 of the data set holds a dict; give tensors, arrays or images"),
        (Pairs([(torch.zeros(3), "cat")]), r"the labels of sample 0 of the data set holds? a str"),
        (Pairs([(torch.zeros(3), torch.eye(3)[0])]), r"sample 0 .*; give one class number for each sample"),
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


def test_random_transforms_are_refused() -> None:
    class Noisy(Pairs):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(3), 0

    with pytest.raises(DataError, match=r"sample 0 of noise .* differs when it is read again; take random transforms out"):
        make_dataset(Noisy([0, 0]), name="noise")


def test_parts_that_do_not_fit_together_are_refused() -> None:
    train = torch.zeros(3, 4), torch.arange(3)
    with pytest.raises(DataError, match=r"training samples are \(4,\) torch.float32, test samples \(5,\)"):
        make_dataset(train, (torch.zeros(3, 5), torch.arange(3)), name="x")
    with pytest.raises(DataError, match=r"training samples are presented as float32 as it is, test samples as uint8 / 255"):
        make_dataset(train, (torch.zeros(3, 4, dtype=torch.uint8), torch.arange(3)), name="x")


def test_classes_are_those_of_both_parts() -> None:
    dataset = make_dataset((torch.zeros(3, 4), torch.arange(3)), (torch.zeros(3, 4).double(), torch.arange(3) + 2), name="a b/c")
    assert (dataset.num_classes, dataset.name) == (5, "a-b-c")
    everything(dataset.train)
    everything(dataset.test)


# ---- tokens with a label each


def tokens(length: int = 6, context: int = 4) -> tuple[Tensor, Tensor]:
    """Windows of 0, 1, 2, ... and what comes next."""
    numbers = torch.arange(length * context + 1)
    return numbers[:-1].clone().reshape(length, context), numbers[1:].clone().reshape(length, context)


@pytest.mark.parametrize("form", ["tensors", "arrays", "int32", "uint16", "TensorDataset", "Subset", "pairs", "npz", "factory"])
def test_every_token_may_have_a_label(form: str, tmp_path: Path) -> None:
    x, y = tokens()
    arrays = x.numpy(), y.numpy()
    if form == "npz":
        dataset = find_dataset(save(tmp_path / "a.npz", x_train=arrays[0], y_train=arrays[1]), NOWHERE, "any", context=9)
    elif form == "factory":
        (tmp_path / "own.py").write_text(
            "import torch\ndef load():\n    a = torch.arange(25)\n    return a[:-1].reshape(6, 4), a[1:].reshape(6, 4)"
        )
        dataset = find_dataset(f"{tmp_path}/own.py:load", NOWHERE, "any")
    else:
        made: dict[str, Any] = {
            "tensors": (x, y),
            "arrays": arrays,
            "int32": (x.int(), y.int()),
            "uint16": (arrays[0].astype(np.uint16), arrays[1].astype(np.uint16)),
            "TensorDataset": TensorDataset(x, y),
            "Subset": Subset(TensorDataset(x, y), list(range(6))),
            "pairs": Pairs(list(zip(x, y, strict=True))),
        }
        dataset = make_dataset(made[form], name="tokens")
    assert (dataset.sample_shape, dataset.label_shape, dataset.dtype, dataset.num_classes) == ((4,), (4,), torch.int64, 25)
    found = dataset.train.batch([4, 0, 4])
    assert all(map(torch.equal, found, (x[[4, 0, 4]], y[[4, 0, 4]])))
    train, val = train_val(dataset.train, 0.3, seed=0, limit=None)
    assert val is not None
    assert torch.equal(torch.cat([everything(part)[1] for part in (train, val)]).flatten().sort().values, y.flatten())
    assert torch.equal(subset(dataset.train, np.array([5])).batch([0])[1], y[5:])


@pytest.mark.parametrize(
    "kind", [tuple, lambda parts: TensorDataset(*parts), lambda parts: Pairs(list(zip(*parts, strict=True)))]
)
def test_classes_of_tokens_are_those_of_both(kind: Any) -> None:
    x, y = tokens()
    high = x.clone()
    high[2, 1] = 90
    assert from_torch(kind((high, y))).num_classes == 91
    assert make_dataset(kind((x, y)), kind((high, y)), name="x").num_classes == 91
    assert make_dataset(kind((x, y)), name="x", num_classes=256).num_classes == 256
    # A label for the whole sample says nothing of the tokens, as it was.
    assert from_torch(kind((high, torch.tensor([0, 1, 1, 0, 2, 0])))).num_classes == 3


@pytest.mark.parametrize("kind", [tuple, lambda parts: TensorDataset(*parts)])
@pytest.mark.parametrize(("part", "value", "word"), [(0, 30, "token"), (0, -1, "token"), (1, 25, "label"), (1, -100, "label")])
def test_a_token_that_is_no_class_is_named(kind: Any, part: int, value: int, word: str) -> None:
    parts = tokens()
    parts[part][3, 2] = value
    split = from_torch(kind(parts), num_classes=25, where="mine")
    split.batch([0, 2, 5])
    with pytest.raises(
        DataError, match=rf"sample 3 of mine has {word} {value}, outside 0 to 24 \(25 classes\); number the classes"
    ):
        split.batch([5, 3])


def test_token_arrays_are_looked_at_as_they_are_opened() -> None:
    parts = tokens()
    parts[0][3, 2] = 30
    with pytest.raises(DataError, match=r"sample 3 of x \(training part\) has token 30"):
        make_dataset(parts, name="x", num_classes=25)


def test_labels_of_two_shapes_are_refused() -> None:
    x, y = tokens()
    with pytest.raises(
        DataError, match=r"'x': a training sample's labels have shape \(4,\), a test sample's \(\); give both one"
    ):
        make_dataset((x, y), (x, y[:, 0]), name="x")
    split = from_torch(Pairs([(x[0], y[0]), (x[1], 3)]), num_classes=25, where="mine")
    with pytest.raises(
        DataError, match=r"sample 1 of mine has labels of shape \(\), sample 0 of \(4,\); give all samples labels"
    ):
        split.batch([0, 1])


def test_one_label_for_a_row_of_tokens_is_still_one() -> None:
    x, y = tokens()
    for labels in (y[:, 0], y[:, :1]):
        dataset = make_dataset((x, labels), name="x")
        assert dataset.label_shape == ()
        assert everything(dataset.train)[1].tolist() == y[:, 0].tolist()


def test_token_labels_are_in_the_fingerprint() -> None:
    x, y = tokens()
    other = y.clone()
    other[2, 2] = 0
    for kind in (tuple, lambda parts: TensorDataset(*parts)):
        prints = [make_dataset(kind(parts), name="x").fingerprint for parts in ((x, y), (x, y.clone()), (x, other))]
        assert prints[0] == prints[1] != prints[2]


# ---- fingerprints


def test_a_fingerprint_changes_with_the_data_only() -> None:
    x, y = torch.rand(20, 3), torch.arange(20)
    changed = x.clone()
    changed[13, 1] += 1e-6
    arrays = [make_dataset(data, name="x").fingerprint for data in ((x, y), (x.clone(), y), (changed, y), (x, y.flip(0)))]
    assert arrays[0] == arrays[1]
    assert len(set(arrays)) == 3
    maps = [make_dataset(TensorDataset(*data), name="x").fingerprint for data in ((x, y), (x.clone(), y), (x[:-1], y[:-1]))]
    assert maps[0] == maps[1] != maps[2]


@pytest.mark.parametrize("position", [0, 40_000_001, 69_999_999])
def test_a_large_array_is_hashed_to_its_last_byte(position: int) -> None:
    import hashlib

    x = torch.zeros(70_000_000 - 3, dtype=torch.uint8)
    digests = []
    for value in (0, 1):
        x[min(position, len(x) - 1)] = value
        digest = hashlib.sha256()
        hash_tensor(digest, x)
        digests.append(digest.hexdigest())
    assert digests[0] != digests[1]


# ---- names


def test_digits_are_divided_in_equal_shares() -> None:
    dataset = find_dataset("digits", NOWHERE, "flat")
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (1437, 360, 10)
    assert (dataset.name, dataset.sample_shape, dataset.preprocessing) == ("digits", (64,), "values / 16, flattened")
    (x_train, y_train), (x_test, y_test) = everything(dataset.train), everything(dataset.test)
    assert x_train.min() == 0
    assert x_train.max() == 1
    sizes = y_train.bincount() + y_test.bincount()
    assert (5 * y_test.bincount() - sizes).abs().max() < 5
    from sklearn.datasets import load_digits

    everyone = sorted(map(tuple, torch.cat([x_train, x_test]).mul(16).int().tolist()))
    assert everyone == sorted(map(tuple, load_digits().data.astype(int).tolist()))
    assert dataset.fingerprint == find_dataset("digits", NOWHERE, "flat").fingerprint
    assert find_dataset("digits", NOWHERE, "image3").sample_shape == (3, 8, 8)
    assert find_dataset("digits", NOWHERE, "any").sample_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar-10", r"there is no data set 'cifar-10'; did you mean 'cifar10'.*; others are given as npz:FILE, imagefolder:DIR"),
        ("my.npz", r"data set 'my.npz' is a file; write npz:my.npz"),
    ],
)
def test_an_unknown_name_is_said(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_dataset(spec, NOWHERE, "any")


def write_idx(path: Path, array: np.ndarray) -> None:
    """A file of MNIST's format."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize(
    ("spec", "folder", "prefix"),
    [("mnist", "MNIST", ""), ("fashion-mnist", "FashionMNIST", ""), ("emnist-balanced", "EMNIST", "emnist-balanced-")],
)
def test_torchvisions_files_are_read(spec: str, folder: str, prefix: str, tmp_path: Path) -> None:
    raw = tmp_path / folder / "raw"
    x = images((28, 28))
    names = ("train", "test") if prefix else ("train", "t10k")
    for number, name in enumerate(names):
        write_idx(raw / f"{prefix}{name}-images-idx3-ubyte", x[number:])
        write_idx(raw / f"{prefix}{name}-labels-idx1-ubyte", np.arange(6, dtype=np.uint8)[number:])
    dataset = find_dataset(spec, tmp_path, "any")
    upright = x.transpose(0, 2, 1) if prefix else x
    assert dataset.test is not None
    found, labels = everything(dataset.test)
    assert torch.equal(found, torch.from_numpy(upright[1:].copy()).unsqueeze(1) / 255)
    assert labels.tolist() == [1, 2, 3, 4, 5]
    assert (len(dataset.train), dataset.num_classes, dataset.name) == (6, 6, spec)
    assert dataset.preprocessing == ("made upright, " if prefix else "") + "uint8 / 255, HW to CHW"


class FakeCifar:
    """Stands for torchvision's class, whose files are checked by hash."""

    error: Exception | None = None

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        assert download
        print("Files already downloaded")
        if self.error is not None:
            raise self.error
        self.data = images((32, 32, 3))
        self.targets = [0, 1, 2, 9, 4, 5]


def test_cifar_is_presented_and_prints_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    dataset = find_dataset("cifar10", NOWHERE, "image3")
    assert (dataset.sample_shape, dataset.num_classes, dataset.preprocessing) == ((3, 32, 32), 10, "uint8 / 255, HWC to CHW")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "error", [RuntimeError("Error downloading x\nmore"), OSError("<urlopen error no network>"), EOFError("short")]
)
def test_a_failed_download_is_said(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    monkeypatch.setattr(FakeCifar, "error", error)
    with pytest.raises(DataError, match=rf"data set 'cifar10' is not usable in {tmp_path} and could not be .*npz:FILE") as raised:
        find_dataset("cifar10", tmp_path, "image3")
    assert "\n" not in str(raised.value)


# ---- npz


def test_npz_of_the_keras_layout(tmp_path: Path) -> None:
    x = images((8, 8, 3))
    spec = save(tmp_path / "my set.npz", x_train=x, y_train=np.arange(6).reshape(6, 1), x_test=x[:2], y_test=np.array([7.0, 0.0]))
    dataset = find_dataset(spec, NOWHERE, "image3")
    assert dataset.test is not None
    assert (dataset.name, dataset.num_classes, len(dataset.train), len(dataset.test)) == ("my-set", 8, 6, 2)
    assert everything(dataset.train)[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert everything(dataset.test)[1].tolist() == [7, 0]


def test_npz_without_a_test_part(tmp_path: Path) -> None:
    assert (
        find_dataset(save(tmp_path / "a", x_train=np.zeros((3, 2)), y_train=np.arange(3)) + ".npz", NOWHERE, "any").test is None
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": [1], "y_train": [1]},
            r"lacks x_train; it holds x, y_train; save x_train, y_train, x_test, y_test with numpy.savez",
        ),
        ({"x_train": np.zeros((2, 2)), "y_train": [0, 1], "x_test": np.zeros((2, 2))}, r"lacks y_test"),
        ({"x_train": np.zeros((0, 2)), "y_train": np.zeros(0)}, r"a.npz \(training part\) is empty"),
        ({"x_train": np.zeros((2, 2)), "y_train": [0, 1, 2]}, r"2 samples but 3 labels"),
        ({"x_train": np.zeros((2, 2)), "y_train": [0, -1]}, r"y_train holds the label -1; number the classes from 0"),
        ({"x_train": np.zeros(()), "y_train": [0]}, r"x_train has shape \(\) and y_train \(1,\)"),
        (
            {"x_train": np.array([{}, {}]), "y_train": [0, 1]},
            r"cannot be read as .npz: ValueError: Object arrays cannot be loaded",
        ),
    ],
)
def test_npz_faults_are_said(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    spec = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as raised:
        find_dataset(spec, NOWHERE, "any")
    assert "\n" not in str(raised.value)


def test_npz_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"there is no file {tmp_path}/a.npz; give npz:FILE"):
        find_dataset(f"npz:{tmp_path}/a.npz", NOWHERE, "any")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"text.npz cannot be read as .npz"):
        find_dataset(f"npz:{tmp_path}/text.npz", NOWHERE, "any")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"one.npy holds a single array; save"):
        find_dataset(f"npz:{tmp_path}/one.npy", NOWHERE, "any")
    whole = Path(save(tmp_path / "cut.npz", x_train=np.zeros((99, 99)), y_train=np.zeros(99)).removeprefix("npz:"))
    whole.write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"cut.npz cannot be read as .npz"):
        find_dataset(f"npz:{whole}", NOWHERE, "any")


@pytest.mark.skipif(
    not Path(os.environ.get("LOWMEM_PNN_DATA", "none"), "emnist47.npz").is_file(), reason="needs emnist47.npz in LOWMEM_PNN_DATA"
)
def test_emnist47_opens() -> None:
    dataset = find_dataset(f"npz:{os.environ['LOWMEM_PNN_DATA']}/emnist47.npz", NOWHERE, "flat")
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test), dataset.num_classes, dataset.sample_shape) == (95_495, 7_050, 47, (784,))
    x, y = dataset.train.batch(np.arange(1410))
    assert x.min() == 0
    assert x.max() == 1
    assert y.max() == 46


# ---- image folders


def write_images(folder: Path, classes: str, num: int = 2, size: tuple[int, int] = (5, 4), mode: str = "RGB") -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(num):
            colour = (ord(name), number, 7) if mode == "RGB" else ord(name)
            Image.new(mode, size, colour).save(folder / name / f"{number}.png")


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_image_folders_with_a_test_part(test_name: str, tmp_path: Path) -> None:
    write_images(tmp_path / "train", "bac")
    write_images(tmp_path / test_name, "ca", num=1)
    (tmp_path / "train" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    dataset = find_dataset(f"imagefolder:{tmp_path}", NOWHERE, "image3")
    assert dataset.test is not None
    x, labels = everything(dataset.train)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert x.shape == (6, 3, 4, 5)
    assert torch.equal(x[3, :, 0, 0], torch.tensor([ord("b"), 1, 7]) / 255)
    assert everything(dataset.test)[1].tolist() == [0, 2]
    assert dataset.num_classes == 3
    assert dataset.preprocessing == "decoded to RGB, uint8 / 255, HWC to CHW"


def test_image_folders_without_a_test_part(tmp_path: Path) -> None:
    write_images(tmp_path, "ab", mode="L")
    dataset = find_dataset(f"imagefolder:{tmp_path}", NOWHERE, "flat")
    assert dataset.test is None
    assert everything(dataset.train)[0].shape == (4, 60)
    before = dataset.fingerprint
    Image.new("L", (5, 4), 1).save(tmp_path / "a" / "0.png")
    assert find_dataset(f"imagefolder:{tmp_path}", NOWHERE, "flat").fingerprint != before


def test_image_folder_faults_are_said(tmp_path: Path) -> None:
    def find(folder: Path) -> Dataset:
        return find_dataset(f"imagefolder:{folder}", NOWHERE, "any")

    with pytest.raises(DataError, match=r"there is no folder .*/none; give imagefolder:DIR"):
        find(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no folders; put the images of each class in a folder of its own"):
        find(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r"is empty: its folders hold 0 images"):
        find(tmp_path)

    write_images(tmp_path / "sizes", "ab")
    write_images(tmp_path / "sizes", "c", size=(6, 4))
    split = find(tmp_path / "sizes").train
    split.batch([0, 3])
    with pytest.raises(DataError, match=r"/c/0.png is 6 x 4 pixels, .*/a/0.png is 5 x 4; give all images one size"):
        split.batch([0, 4])
    (tmp_path / "sizes" / "b" / "1.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"/b/1.png cannot be read as an image \(.*\); repair or remove it"):
        split.batch([3])

    write_images(tmp_path / "more" / "train", "ab")
    write_images(tmp_path / "more" / "test", "abc")
    with pytest.raises(DataError, match=r"more/test/c is a class without training images; the classes are a, b"):
        find(tmp_path / "more")


# ---- factories


@pytest.mark.parametrize(
    ("body", "num_train", "num_test"),
    [
        ("return TensorDataset(torch.zeros(4, 2), torch.arange(4))", 4, None),
        ("return torch.zeros(4, 2), torch.arange(4)", 4, None),
        ("return (torch.zeros(4, 2), torch.arange(4)), (torch.zeros(3, 2), torch.arange(3))", 4, 3),
        ("return TensorDataset(torch.zeros(4, 2), torch.arange(4)), TensorDataset(torch.zeros(3, 2), torch.arange(3))", 4, 3),
        ("return TensorDataset(torch.zeros(4, 2), torch.arange(4)), None", 4, None),
        ("return make_dataset((torch.zeros(4, 2), torch.arange(4)), name='x')", 4, None),
    ],
)
def test_a_factory_returns_data_in_several_ways(body: str, num_train: int, num_test: int | None, tmp_path: Path) -> None:
    head = "import torch\nfrom torch.utils.data import TensorDataset\nfrom lowmem_pnn.sources.datasets import make_dataset\n"
    (tmp_path / "own.py").write_text(f"{head}def load():\n    {body}\n")
    dataset = find_dataset(f"{tmp_path}/own.py:load", NOWHERE, "flat")
    assert len(dataset.train) == num_train
    assert (dataset.test and len(dataset.test)) == num_test
    assert dataset.num_classes == 4
    assert dataset.name in ("own-load", "x")


def test_a_factory_that_returns_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def load():\n    pass\n")
    with pytest.raises(DataError, match=r"load\(\) returned no data; return train, \(train, test\) or a lowmem_pnn Dataset"):
        find_dataset(f"{tmp_path}/own.py:load", NOWHERE, "flat")

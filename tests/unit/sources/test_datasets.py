"""Data sets by name and from Python: what the model sees, how they are divided, and what is refused."""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from helpers.datasets import NOWHERE, Drawn, Pairs, everything, image_bytes, save, token_windows
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.sources.datasets import find_dataset, make_dataset
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.subsets import subset, train_val_split

# From Python.


def test_a_map_style_data_set_of_anything() -> None:
    grey = Image.fromarray(image_bytes((4, 5))[0])
    for x, shape in ((torch.rand(3), (3,)), (np.ones((2, 2)), (2, 2)), (grey, (1, 4, 5)), (3, ()), (2.5, ())):
        for label in (1, np.int64(1), torch.tensor(1), torch.tensor([1])):
            dataset = make_dataset(Pairs([(x, 0), (x, label)]), name="pairs")
            found, labels = everything(dataset.train)
            assert (found.shape, labels.tolist()) == ((2, *shape), [0, 1])
            assert dataset.num_classes == 2


def test_random_transforms_are_noticed_in_the_training_part() -> None:
    dataset = make_dataset(Drawn(list(zip(torch.rand(4, 3), [0, 1, 0, 1], strict=True))), name="noise")
    assert (dataset.is_random, dataset.fingerprint) == (True, make_dataset(dataset.train, name="noise").fingerprint)
    assert not make_dataset((torch.rand(4, 3), torch.arange(4)), dataset.train, name="noise").is_random


def test_parts_that_do_not_fit_together_are_refused() -> None:
    train = torch.zeros(3, 4), torch.arange(3)
    with pytest.raises(DataError, match=r"training samples are \(4,\) torch.float32, test samples \(5,\)"):
        make_dataset(train, (torch.zeros(3, 5), torch.arange(3)), name="x")
    with pytest.raises(DataError, match=r"training samples are presented as float32 as it is, test samples as uint8 / 255"):
        make_dataset(train, (torch.zeros(3, 4, dtype=torch.uint8), torch.arange(3)), name="x")


def test_a_validation_part_is_held_against_the_training_part() -> None:
    train = torch.zeros(3, 4), torch.arange(3)
    dataset = make_dataset(train, val=(torch.ones(2, 4), torch.tensor([1, 4])), name="x")
    assert dataset.val is not None
    assert (everything(dataset.val)[1].tolist(), dataset.test, dataset.num_classes) == ([1, 4], None, 5)
    as_test = make_dataset(train, (torch.ones(2, 4), torch.tensor([1, 4])), name="x")
    assert dataset.fingerprint != as_test.fingerprint
    with pytest.raises(DataError, match=r"training samples are \(4,\) torch.float32, validation samples \(5,\)"):
        make_dataset(train, val=(torch.zeros(3, 5), torch.arange(3)), name="x")


def test_classes_are_those_of_both_parts() -> None:
    dataset = make_dataset((torch.zeros(3, 4), torch.arange(3)), (torch.zeros(3, 4).double(), torch.arange(3) + 2), name="a b/c")
    assert (dataset.num_classes, dataset.name) == (5, "a-b-c")
    everything(dataset.train)
    everything(dataset.test)


# Tokens with a label each.


@pytest.mark.parametrize("form", ["tensors", "arrays", "int32", "uint16", "TensorDataset", "Subset", "pairs", "npz", "factory"])
def test_every_token_may_have_a_label(form: str, tmp_path: Path) -> None:
    x, y = token_windows()
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
    train, val = train_val_split(dataset.train, 0.3, seed=0, limit=None)
    assert val is not None
    assert torch.equal(torch.cat([everything(part)[1] for part in (train, val)]).flatten().sort().values, y.flatten())
    assert torch.equal(subset(dataset.train, np.array([5])).batch([0])[1], y[5:])


def test_token_arrays_are_looked_at_as_they_are_opened() -> None:
    parts = token_windows()
    parts[0][3, 2] = 30
    with pytest.raises(DataError, match=r"sample 3 of x \(training part\) has token 30"):
        make_dataset(parts, name="x", num_classes=25)


def test_labels_of_two_shapes_are_refused() -> None:
    x, y = token_windows()
    with pytest.raises(
        DataError, match=r"'x': a training sample's labels have shape \(4,\), a test sample's \(\); give both one"
    ):
        make_dataset((x, y), (x, y[:, 0]), name="x")
    split = from_torch(Pairs([(x[0], y[0]), (x[1], 3)]), num_classes=25, where="mine")
    with pytest.raises(DataError, match=r"sample 1 of mine has labels of shape \(\), others of \(4,\); give all samples labels"):
        split.batch([0, 1])


def test_one_label_for_a_row_of_tokens_is_still_one() -> None:
    x, y = token_windows()
    for labels in (y[:, 0], y[:, :1]):
        dataset = make_dataset((x, labels), name="x")
        assert dataset.label_shape == ()
        assert everything(dataset.train)[1].tolist() == y[:, 0].tolist()


def test_token_labels_are_in_the_fingerprint() -> None:
    x, y = token_windows()
    other = y.clone()
    other[2, 2] = 0
    for kind in (tuple, lambda parts: TensorDataset(*parts)):
        prints = [make_dataset(kind(parts), name="x").fingerprint for parts in ((x, y), (x, y.clone()), (x, other))]
        assert prints[0] == prints[1] != prints[2]


# Fingerprints.


def test_a_fingerprint_changes_with_the_data_only() -> None:
    x, y = torch.rand(20, 3), torch.arange(20)
    changed = x.clone()
    changed[13, 1] += 1e-6
    arrays = [make_dataset(data, name="x").fingerprint for data in ((x, y), (x.clone(), y), (changed, y), (x, y.flip(0)))]
    assert arrays[0] == arrays[1]
    assert len(set(arrays)) == 3
    maps = [make_dataset(TensorDataset(*data), name="x").fingerprint for data in ((x, y), (x.clone(), y), (x[:-1], y[:-1]))]
    assert maps[0] == maps[1] != maps[2]


# By name.


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
        ("photos/", r"there is no folder or file 'photos/'; data in one is given by its kind, as imagefolder:photos/ for images"),
        ("my.npz", r"data set 'my.npz' looks like a file, which is not there; write npz:my.npz"),
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
    x = image_bytes((28, 28))
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


def test_a_file_of_mnists_that_says_another_type_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    for name in ("train", "t10k"):
        write_idx(raw / f"{name}-images-idx3-ubyte", image_bytes((28, 28)))
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(6, dtype=np.uint8))
    labels = raw / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes().replace(b"\0\0\x08", b"\0\0\x09", 1))  # int8
    with pytest.raises(DataError, match=r"data set 'mnist' is not usable in .*: TypeError: x should be of dtype torch.uint8"):
        find_dataset("mnist", tmp_path, "any")


class FakeCifar:
    """Stands for torchvision's class, whose files are checked by hash."""

    error: Exception | None = None

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        assert download
        print("Files already downloaded")
        if self.error is not None:
            raise self.error
        self.data = image_bytes((32, 32, 3))
        self.targets = [0, 1, 2, 9, 4, 5]


def test_cifar_is_presented_and_prints_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    dataset = find_dataset("cifar10", NOWHERE, "image3")
    assert (dataset.sample_shape, dataset.num_classes, dataset.preprocessing) == ((3, 32, 32), 10, "uint8 / 255, HWC to CHW")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Error downloading x\nmore"),
        OSError("<urlopen error no network>"),
        EOFError("short"),
        TypeError("x should be of dtype torch.uint8"),
        struct.error("unpack requires a buffer of 4 bytes"),
    ],
)
def test_a_failed_download_is_said(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    monkeypatch.setattr(FakeCifar, "error", error)
    with pytest.raises(DataError, match=rf"data set 'cifar10' is not usable in {tmp_path} and could not be .*npz:FILE") as raised:
        find_dataset("cifar10", tmp_path, "image3")
    assert "\n" not in str(raised.value)


# Files of arrays.


def test_npz_of_the_keras_layout(tmp_path: Path) -> None:
    x = image_bytes((8, 8, 3))
    spec = save(tmp_path / "my set.npz", x_train=x, y_train=np.arange(6).reshape(6, 1), x_test=x[:2], y_test=np.array([7.0, 0.0]))
    dataset = find_dataset(spec, NOWHERE, "image3")
    assert dataset.test is not None
    assert (dataset.name, dataset.num_classes, len(dataset.train), len(dataset.test)) == ("my-set", 8, 6, 2)
    assert everything(dataset.train)[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert everything(dataset.test)[1].tolist() == [7, 0]


def test_npz_of_x_and_y_is_all_trained_on(tmp_path: Path) -> None:
    dataset = find_dataset(save(tmp_path / "a", x=np.zeros((3, 2)), y=np.arange(3)) + ".npz", NOWHERE, "any")
    assert (len(dataset.train), dataset.test, dataset.num_classes) == (3, None, 3)


def test_npz_without_a_test_part(tmp_path: Path) -> None:
    assert (
        find_dataset(save(tmp_path / "a", x_train=np.zeros((3, 2)), y_train=np.arange(3)) + ".npz", NOWHERE, "any").test is None
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": [1], "y_train": [1]},
            r"lacks x_train; it holds x, y_train; save x_train, y_train, x_test, y_test, or x and y, with numpy.savez",
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


@pytest.mark.parametrize(
    "error", [struct.error("unpack"), TypeError("of numpy"), RuntimeError("it is encrypted"), RecursionError()]
)
def test_whatever_numpy_raises_for_a_damaged_file_is_said(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    spec = save(tmp_path / "a.npz", x_train=np.zeros((3, 2)), y_train=np.arange(3))
    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(DataError, match=r"a.npz cannot be read as .npz: \w+"):
        find_dataset(spec, NOWHERE, "any")


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


# Factories.

PART = "(torch.zeros(4, 2), torch.arange(4))"


@pytest.mark.parametrize(
    ("body", "num_train", "num_test", "num_val"),
    [
        ("return TensorDataset(torch.zeros(4, 2), torch.arange(4))", 4, None, None),
        ("return torch.zeros(4, 2), torch.arange(4)", 4, None, None),
        ("return (torch.zeros(4, 2), torch.arange(4)), (torch.zeros(3, 2), torch.arange(3))", 4, 3, None),
        (
            "return TensorDataset(torch.zeros(4, 2), torch.arange(4)), TensorDataset(torch.zeros(3, 2), torch.arange(3))",
            4,
            3,
            None,
        ),
        ("return TensorDataset(torch.zeros(4, 2), torch.arange(4)), None", 4, None, None),
        ("return make_dataset((torch.zeros(4, 2), torch.arange(4)), name='x')", 4, None, None),
        (f"return {PART}, {PART}, {PART.replace('4', '3')}", 4, 3, 4),
        (f"return {PART}, None, {PART.replace('4', '3')}", 4, 3, None),
        (f"return {{'train': {PART}, 'validation': TensorDataset(*{PART.replace('4', '2')})}}", 4, None, 2),
        (f"return {{'train': {PART}, 'val': {PART.replace('4', '2')}, 'test': {PART.replace('4', '3')}}}", 4, 3, 2),
    ],
)
def test_a_factory_returns_data_in_several_ways(
    body: str, num_train: int, num_test: int | None, num_val: int | None, tmp_path: Path
) -> None:
    head = "import torch\nfrom torch.utils.data import TensorDataset\nfrom lowmem_pnn.sources.datasets import make_dataset\n"
    (tmp_path / "own.py").write_text(f"{head}def load():\n    {body}\n")
    dataset = find_dataset(f"{tmp_path}/own.py:load", NOWHERE, "flat")
    assert len(dataset.train) == num_train
    assert (dataset.test and len(dataset.test)) == num_test
    assert (dataset.val and len(dataset.val)) == num_val
    assert dataset.num_classes == 4
    assert dataset.name in ("own-load", "x")


def test_a_class_is_a_factory_too(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nclass Squares(torch.utils.data.Dataset):\n    def __len__(self):\n        return 4\n"
        "    def __getitem__(self, index):\n        return torch.tensor([float(index**2)]), index % 2\n"
    )
    x, y = everything(find_dataset(f"{tmp_path}/own.py:Squares", NOWHERE, "flat").train)
    assert (x.flatten().tolist(), y.tolist()) == ([0, 1, 4, 9], [0, 1, 0, 1])


def test_a_factory_that_returns_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def load():\n    pass\n")
    with pytest.raises(
        DataError, match=r"load\(\) returned no data; return train, \(train, test\), \(train, val, test\), a dictionary"
    ):
        find_dataset(f"{tmp_path}/own.py:load", NOWHERE, "flat")

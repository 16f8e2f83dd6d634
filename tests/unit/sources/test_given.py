"""Data as people give it: lists, tables, words as labels, loaders and streams."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from helpers.datasets import NOWHERE, Pairs, everything, save
from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.datasets import find_dataset, make_dataset
from lowmem_pnn.sources.map_split import from_torch

X, Y = torch.arange(12.0).reshape(4, 3), [2, 0, 1, 2]


class Table:
    """A table as pandas has them: columns by name, each of one type."""

    def __init__(self, columns: dict[str, Sequence[Any]]) -> None:
        self.columns = list(columns)
        self._values = list(columns.values())

    def __len__(self) -> int:
        return len(self._values[0])

    def __getitem__(self, name: str) -> Sequence[Any]:
        return self._values[self.columns.index(name)]

    def to_numpy(self) -> np.ndarray:
        arrays = [np.array(values) for values in self._values]
        types = {array.dtype for array in arrays}
        return np.stack([array if len(types) == 1 else array.astype(object) for array in arrays], axis=1)


class Column(Table):
    def to_numpy(self) -> np.ndarray:
        return np.array(self._values[0])


class Array:
    """An array of another library."""

    def __init__(self, values: Any) -> None:
        self._values = np.asarray(values)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return self._values


class Endless(Pairs):
    def __len__(self) -> int:
        raise NotImplementedError("a stream")


NUMBERS = Table({name: X[:, index].tolist() for index, name in enumerate("abc")})


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        (X, tuple(Y)),
        [X, Y],
        (X.numpy(), np.array(Y)),
        (X.tolist(), Y),
        (X.tolist(), torch.tensor(Y)),
        (list(X), Y),
        (list(X.numpy()), Y),
        (NUMBERS, Column({"y": Y})),
        (NUMBERS, Table({"y": Y})),
        (NUMBERS, [float(label) for label in Y]),
        (Array(X), Array(Y)),
        Pairs([(Array(row), label) for row, label in zip(X, Y, strict=True)]),
        (X, list(torch.tensor(Y))),
        [(row, label) for row, label in zip(X, Y, strict=True)],
        Pairs([(row.tolist(), label) for row, label in zip(X, Y, strict=True)]),
    ],
)
def test_what_converts_without_loss_is_taken(data: Any) -> None:
    x, y = everything(from_torch(data))
    assert torch.equal(x, X)
    assert y.tolist() == Y


def test_a_range_numbers_samples() -> None:
    assert everything(from_torch((X, range(4))))[1].tolist() == [0, 1, 2, 3]


def test_a_table_of_numbers_of_several_types_is_taken() -> None:
    table = Table({"age": [3, 4], "height": [1.5, 2.5], "member": [True, False]})
    assert torch.equal(from_torch((table, [0, 1])).batch([0, 1])[0], torch.tensor([[3, 1.5, 1], [4, 2.5, 0]]))


def test_two_samples_in_a_list_are_two_samples() -> None:
    x, y = everything(from_torch([(torch.ones(3), 1), (torch.zeros(3), 0)]))
    assert (x[:, 0].tolist(), y.tolist()) == ([1, 0], [1, 0])


@pytest.mark.parametrize("body", ["[[1.0, 2.0], [3.0, 4.0]], [0, 1]", "np.ones((2, 2)), [0, 1]"])
def test_a_factory_may_return_lists(body: str, tmp_path: Any) -> None:
    (tmp_path / "own.py").write_text(f"import numpy as np\ndef load():\n    return {body}\n")
    assert everything(find_dataset(f"{tmp_path}/own.py:load", NOWHERE, "flat").train)[1].tolist() == [0, 1]


def sparse() -> Any:
    from scipy.sparse import csr_matrix

    return csr_matrix(np.eye(4))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(2), 0)])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            (torch.nested.nested_tensor([torch.zeros(2)] * 4, layout=torch.jagged), Y),
            r"the data set holds a nested tensor; make it dense with",
        ),
        (
            (np.ma.masked_less(np.eye(4), 0.5), Y),
            r"the data set holds a masked array with masked values, .* fill them, with filled\(\)$",
        ),
        ((sparse(), Y), r"the data set holds a sparse csr_matrix; make it dense with toarray\(\)$"),
        (
            (X, ["cat", "dog", "eel", "cat"]),
            r"the data set: labels are words \('cat', 'dog', 'eel'\); give class numbers, the same for training and test: "
            r"y = np.unique\(names, return_inverse=True\)\[1\] of all names together$",
        ),
        ((X, np.array(list("abcd"), dtype=object)), r"labels are words \('a', 'b', 'c', 'd'\)"),
        ((np.zeros((8, 2)), list("abcdefgh")), r"labels are words \('a', 'b', 'c', 'd', 'e' and 3 more\)"),
        ((X, Column({"y": ["no", "yes", "no", "no"]})), r"labels are words \('no', 'yes'\)"),
        (
            Pairs([(torch.zeros(3), "cat")]),
            r"the labels of sample 0 of the data set hold a str \('cat'\); give class numbers from 0, such as names.index\('cat'\) of",
        ),
        (
            (Table({"age": [3, 4], "city": ["Oslo", "Bern"]}), [0, 1]),
            r"the data set: column 'city' holds 'Oslo' \(str\); give numbers alone, or leave the column out$",
        ),
        (([[1.0, 2.0], [3.0]], [0, 1]), r"the data set: a list has rows that differ in shape; give all samples one shape$"),
        (([torch.zeros(2), torch.zeros(3)], [0, 1]), r"the data set: a list has rows that differ in shape"),
        (([["a", "b"]], [0]), r"the data set holds values of dtype <U1; give real numbers"),
        (([[1.0, None]], [0]), r"the data set holds values of dtype object; give real numbers"),
        (
            DataLoader(TensorDataset(X, torch.tensor(Y)), batch_size=2),
            r"the data set is a DataLoader; give the data set that it loads from \(loader.dataset\), or the loader itself to",
        ),
        (
            Stream(),
            r"the data set is an IterableDataset \(Stream\), a stream; give a map-style data set, .*: list\(stream\) where it fits",
        ),
        ({"x": X, "y": Y}, r"the data set is a dict \('x', 'y'\); give the pair \(x, y\)"),
        (X, r"the data set is one Tensor, without labels; give the pair \(x, y\)"),
        (X.numpy(), r"the data set is one ndarray, without labels"),
        ((X, None), r"the data set: the labels are a NoneType; give a tensor, an array or a list of class numbers$"),
        ((X, [[0], [1], [1, 2], [0]]), r"the labels of the data set: a list has rows that differ in shape"),
        (NUMBERS, r"the data set is one Table, without labels; give the pair \(x, y\)"),
        (
            Endless([]),
            r"the data set is a Endless whose length cannot be told: NotImplementedError: a stream; see to its __len__",
        ),
        (
            Pairs([(Image.new("P", (3, 3)), 0)]),
            r"sample 0 of the data set holds an image of mode P, whose values are places in a palette .*; give image.convert\('RGB'\)",
        ),
    ],
)
def test_what_does_not_is_said_in_words(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        from_torch(data)
    assert "\n" not in str(raised.value)


def test_words_in_a_file_are_said_in_words(tmp_path: Any) -> None:
    spec = save(tmp_path / "a.npz", x_train=np.zeros((2, 2)), y_train=["cat", "dog"])
    with pytest.raises(DataError, match=r"a.npz: y_train: labels are words \('cat', 'dog'\); give class numbers"):
        find_dataset(spec, NOWHERE, "any")


def test_an_image_that_is_read_late_is_named() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (9, 9)).astype(np.uint8)).save(stream, "PNG")
    whole = stream.getvalue()

    class Files(Pairs):
        def __getitem__(self, index: int) -> Any:
            return Image.open(io.BytesIO(self.items[index])), index % 2

    files = Files([whole, whole[:60], whole])
    split = from_torch(files, num_classes=2, where="mine")
    with pytest.raises(
        DataError, match=r"sample 1 of mine cannot be read: OSError: .*; repair it or leave it out \(--skip-broken\)$"
    ):
        split.batch([0, 1])
    assert list(from_torch(files, where="mine", skip_broken=True).skipped) == ["sample 1 of mine"]


def test_targets_that_become_class_numbers_later_are_counted() -> None:
    pairs = Pairs([(torch.zeros(2), 0), (torch.zeros(2), 2)])
    pairs.targets = ["cat", "eel"]  # type: ignore[attr-defined]
    assert from_torch(pairs).num_classes == 3


# Broken samples.


class Faulty(Pairs):
    def __getitem__(self, index: int) -> Any:
        if index in (0, 5):
            raise OSError("cut off")
        return super().__getitem__(index)


def test_broken_samples_of_a_map_style_data_set_are_left_out_and_named() -> None:
    items = [(torch.full((3,), float(index)), index % 2) for index in range(8)]
    items[2] = (torch.tensor([1.0, float("nan"), 0.0]), 1)
    items[3] = (torch.zeros(4), 1)
    items[6] = (torch.tensor([1.0, 1e300, 0.0], dtype=torch.float64).float(), 0)
    with pytest.raises(
        DataError,
        match=r"sample 0 of x \(training part\) cannot be read: OSError: cut off; repair it or leave it out \(--skip-broken\)$",
    ):
        make_dataset(Faulty(items), name="x")
    dataset = make_dataset(Faulty(items), name="x", skip_broken=True)
    x, y = everything(dataset.train)
    assert (x[:, 0].tolist(), y.tolist()) == ([1, 4, 7], [1, 0, 1])
    assert dict(dataset.skipped) == {
        "sample 0 of x (training part)": "cannot be read: OSError: cut off",
        "sample 2 of x (training part)": "holds NaN",
        "sample 3 of x (training part)": "is (4,) torch.float32, most are (3,) torch.float32",
        "sample 5 of x (training part)": "cannot be read: OSError: cut off",
        "sample 6 of x (training part)": "holds an infinite value",
    }
    assert dataset.skipped_samples["count"] == 5
    assert make_dataset(Faulty(items), name="x", skip_broken=True).fingerprint == dataset.fingerprint


def test_broken_rows_of_arrays_are_left_out_and_named(tmp_path: Any) -> None:
    x = np.arange(20.0).reshape(10, 2)
    x[3, 1], x[7, 0], x[8, 0] = np.nan, np.inf, 1e300
    arrays = {"x_train": x, "y_train": np.arange(10), "x_test": x[:4], "y_test": np.arange(4)}
    spec = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(
        DataError, match=r"sample 3 of .*a.npz \(training part\) holds NaN; repair it or leave it out \(--skip-broken\)$"
    ):
        find_dataset(spec, NOWHERE, "any")
    dataset = find_dataset(spec, NOWHERE, "any", skip_broken=True)
    assert dataset.test is not None
    assert everything(dataset.train)[1].tolist() == [0, 1, 2, 4, 5, 6, 9]
    assert everything(dataset.test)[1].tolist() == [0, 1, 2]
    names = [f"sample {number} of {tmp_path}/a.npz (training part)" for number in (3, 7, 8)]
    assert dataset.skipped_samples == {"count": 4, "names": [*names, f"sample 3 of {tmp_path}/a.npz (test part)"]}
    assert dataset.skipped[names[2]] == "holds an infinite value"


def test_a_sample_is_named_by_its_own_number_where_others_were_left_out() -> None:
    x = torch.zeros(6, 2)
    x[1] = float("nan")
    split = from_torch((x, torch.tensor([0, 0, 1, 0, 9, 0])), num_classes=2, where="mine", skip_broken=True)
    with pytest.raises(DataError, match=r"sample 4 of mine has label 9, outside 0 to 1"):
        split.batch([3])


def test_no_more_names_than_a_hundred_are_reported() -> None:
    x = torch.zeros(301, 2)
    x[1:] = float("nan")
    dataset = make_dataset((x, torch.zeros(301)), name="x", skip_broken=True)
    assert (dataset.skipped_samples["count"], len(dataset.skipped_samples["names"])) == (300, 100)


def test_data_without_a_whole_sample_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"x \(training part\): all 3 samples are broken, such as sample 0, which holds NaN; repair"
    ):
        make_dataset((torch.full((3, 2), float("nan")), torch.arange(3)), name="x", skip_broken=True)


# What is as it is elsewhere.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bool, torch.uint8, torch.bfloat16, torch.int16])
def test_tables_of_any_type_keep_their_values(dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    found, _ = everything(from_torch((x, [0, 1]), input_form="flat"))
    assert torch.equal(found, x.float() / (255 if dtype == torch.uint8 else 1))


@pytest.mark.parametrize("labels", [torch.float32, torch.bool, torch.uint8, torch.int32])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_labels_of_any_type_are_class_numbers(labels: torch.dtype, shape: tuple[int, ...]) -> None:
    y = torch.tensor([0, 1, 1, 0]).to(labels).reshape(shape)
    split = from_torch((X, y))
    assert (everything(split)[1].tolist(), split.num_classes) == ([0, 1, 1, 0], 2)


def test_gaps_in_class_numbers_and_one_class_only() -> None:
    assert from_torch((X, [0, 7, 7, 3])).num_classes == 8
    assert from_torch((X, [0, 0, 0, 0])).num_classes == 1


def test_data_sets_of_torch_and_maps_of_files(tmp_path: Any) -> None:
    from torch.utils.data import ConcatDataset, random_split

    whole = TensorDataset(X, torch.tensor(Y))
    first, second = random_split(whole, [3, 1], generator=torch.Generator().manual_seed(0))
    x, y = everything(from_torch(ConcatDataset([first, second])))
    order = [*first.indices, *second.indices]
    assert torch.equal(x, X[order])
    assert y.tolist() == [Y[number] for number in order]
    mapped = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=(4, 3))
    mapped[:] = X.numpy()
    assert torch.equal(everything(from_torch((np.memmap(tmp_path / "x", np.float32, "r", shape=(4, 3)), Y)))[0], X)


def test_torchvisions_image_folder_with_fixed_transforms(tmp_path: Any) -> None:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    for number, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 3), (number, 9, 8)).save(tmp_path / name / "0.png")
    split = from_torch(ImageFolder(str(tmp_path), transform=ToTensor()))
    x, y = everything(split)
    assert (x.shape, y.tolist(), split.num_classes) == ((2, 3, 3, 4), [0, 1], 2)
    assert torch.equal(x[1, :, 0, 0], torch.tensor([1.0, 9.0, 8.0]) / 255)
    assert split.classes == ("cat", "dog")

    class Counting(ImageFolder):
        num_read = 0

        def __getitem__(self, index: int) -> Any:
            self.num_read += 1
            return super().__getitem__(index)

    changed = Counting(str(tmp_path), transform=ToTensor(), target_transform=lambda target: 2 - target)
    changed.samples, changed.targets = changed.samples * 500, changed.targets * 500
    split = from_torch(changed)
    assert (split.num_classes, split.classes, changed.num_read < 100) == (3, (), True)

    class IsCat(ImageFolder):
        def __getitem__(self, index: int) -> Any:
            x, target = super().__getitem__(index)
            return x, int(target == 0)

    assert from_torch(IsCat(str(tmp_path), transform=ToTensor())).classes == ()


def test_five_channels_first_stay_first() -> None:
    x = torch.arange(2 * 5 * 25, dtype=torch.uint8).reshape(2, 5, 5, 5)
    assert torch.equal(everything(from_torch((x, [0, 1])))[0], x / 255)

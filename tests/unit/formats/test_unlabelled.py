"""Data without targets: images without classes, arrays and data sets of samples alone; and what tells them from those with targets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from helpers.datasets import Pairs
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.formats.unlabelled import open_given, open_images, open_npz
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.sources.targets import TargetOptions

AUTO = TargetOptions()


def photo(path: Path, size: tuple[int, int] = (6, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 7, dtype=np.uint8)).save(path)


def given(data: Any, structure: Any = None) -> tuple[Any, bool]:
    tree = None if structure is None else pytree.tree_structure(structure)
    return open_given(data, "mine", "any", tree, AUTO)


# Images.


def test_images_are_found_at_any_depth_and_parts_by_name(tmp_path: Path) -> None:
    for name in ("a.png", "b/c.jpg", "b/d/e.png"):
        photo(tmp_path / "flat" / name)
        photo(tmp_path / "parts" / "Valid" / name)
        photo(tmp_path / "parts" / "test" / name)
    parts, steps = open_images(tmp_path / "flat", "any", ())
    assert {name: (len(split), labelled) for name, (split, labelled) in parts.items()} == {"all": (3, False)}
    assert steps == "decoded to RGB, uint8 / 255, HWC to CHW"
    parts, _ = open_images(tmp_path / "parts", "any", ())
    assert {name: len(split) for name, (split, _) in parts.items()} == {"val": 3, "test": 3}
    parts, _ = open_images(tmp_path / "flat" / "a.png", "any", ())
    assert [len(split) for split, _ in parts.values()] == [1]


@pytest.mark.parametrize("name", ["a.png", "b/deep/c.png"])
def test_images_beside_parts_are_not_left_out(name: str, tmp_path: Path) -> None:
    for other in ("test/1.png", name):
        photo(tmp_path / other)
    with pytest.raises(DataError) as caught:
        open_images(tmp_path, "any", ())
    assert str(caught.value) == (
        f"{tmp_path} holds 'test', named as a part of the data is, and beside that other images, such as {tmp_path / name}; give each by itself "
        f"(imagefolder:{tmp_path / 'test'}), or rename 'test'"
    )


def test_two_folders_of_one_part_are_refused(tmp_path: Path) -> None:
    for other in ("train/1.png", "Training/2.png"):
        photo(tmp_path / other)
    with pytest.raises(DataError, match=r"holds 'Training' and 'train', which both name the training part; keep one"):
        open_images(tmp_path, "any", ())


def test_folders_called_as_the_classes_are_give_targets(tmp_path: Path) -> None:
    for name in ("dogs/1.png", "cats/deep/2.png"):
        photo(tmp_path / name)
    split, labelled = open_images(tmp_path, "any", ("ants", "cats", "dogs"))[0]["all"]
    assert (labelled, split.labels(np.arange(2)).tolist(), split.num_classes) == (True, [1, 2], 3)
    photo(tmp_path / "Ant" / "3.png")
    split, labelled = open_images(tmp_path, "any", ("ants", "cats", "dogs"))[0]["all"]
    assert (labelled, len(split)) == (False, 3)
    assert split.notes == (
        f"targets of {tmp_path} are left aside: 'Ant' is called as no class of the training data is; did you mean 'ants'?",
    )
    split, labelled = open_images(tmp_path, "any", ("0", "1"))[0]["all"]
    assert (labelled, split.notes) == (False, ())  # nothing says that the folders are meant as classes


def test_broken_images_are_named_or_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        photo(tmp_path / name)
    (tmp_path / "c.png").write_text("nothing")
    with pytest.raises(DataError, match=r"c\.png .*; 1 of 3 images cannot be used, --skip-broken leaves them out$"):
        open_images(tmp_path, "any", ())
    split, _ = open_images(tmp_path, "any", (), skip_broken=True)[0]["all"]
    assert (len(split), list(split.skipped)) == (2, [str(tmp_path / "c.png")])
    photo(tmp_path / "c.png", (9, 9))
    with pytest.raises(DataError, match=r"c\.png is 9 x 9 pixels, .*; give all images one size, or --image-size 6; 1 of 3"):
        open_images(tmp_path, "any", ())
    assert open_images(tmp_path, "any", (), resize=Resize(4, 4, "crop"))[0]["all"][0].batch([2])[0].shape == (1, 3, 4, 4)


def test_where_no_image_is_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(DataError) as caught:
        open_images(tmp_path, "any", ())
    assert str(caught.value) == f"{tmp_path} holds 0 images at any depth; give a folder with at least 1"
    with pytest.raises(DataError) as caught:
        open_images(tmp_path / "gone", "any", ())
    assert str(caught.value) == f"there is no folder or image {tmp_path / 'gone'}; give imagefolder:DIR"


# Arrays in a file.


def test_arrays_are_found_by_their_names(tmp_path: Path) -> None:
    x, y = np.zeros((4, 3), np.float32), np.arange(4)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:2])
    parts = open_npz(tmp_path / "a.npz", "any", AUTO)
    assert {name: (len(split), labelled) for name, (split, labelled) in parts.items()} == {"train": (4, True), "test": (2, False)}
    np.savez(tmp_path / "b.npz", other=x)
    with pytest.raises(DataError) as caught:
        open_npz(tmp_path / "b.npz", "any", AUTO)
    assert str(caught.value) == f"{tmp_path / 'b.npz'} holds other, and no x; save samples as x, or as x_test, with numpy.savez"


# From Python.

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("data", "labelled"),
    [
        (X, False),
        (X.tolist(), False),
        ([X[0], X[1]], False),
        ((X, [0, 1]), True),
        (Pairs([(X[0], 1), (X[1], 0)]), True),
        (Pairs([X[0], X[1]]), False),
        (Pairs([{"x": X[0], "label": 1}, {"x": X[1], "label": 0}]), True),
        (Pairs([{"x": X[0]}, {"x": X[1]}]), False),
        (TensorDataset(torch.from_numpy(X)), False),
        (DataLoader(TensorDataset(torch.from_numpy(X))), False),
        ([(X[0], 0), (X[1], 1)], True),
    ],
)
def test_samples_alone_are_told_from_pairs(data: Any, labelled: bool) -> None:
    split, found = given(data)
    x, y = split.batch([0, 1])
    assert (found, x.tolist(), len(y)) == (labelled, X.tolist(), 2)


def test_samples_of_several_tensors_are_told_from_pairs_by_what_the_model_takes() -> None:
    a, b = torch.rand(4, 2), torch.rand(4, 3)
    for data, labelled in (((a, b), False), (((a, b), torch.arange(4)), True), (Pairs(list(zip(a, b, strict=True))), False)):
        split, found = given(data, (0, 0))
        assert (found, [tensor.shape for tensor in split.batch([0, 1])[0]]) == (labelled, [(2, 2), (2, 3)])
    assert given((a, torch.arange(4)))[1]
    with pytest.raises(ConfigError, match=r"^--skip-broken: samples of mine are several tensors"):
        open_given((a, b), "mine", "any", pytree.tree_structure((0, 0)), AUTO, skip_broken=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.tensor(3.0), "mine is one number; give samples (N, ...)"),
        (torch.zeros(0, 3), "mine is empty: it holds 0 samples; give at least 1"),
        (Pairs([]), "mine is empty: it holds 0 samples; give at least 1"),
        (object(), "mine is a object without __getitem__ and __len__; give a map-style data set, so that every index has a fixed "
                   "sample, or tensors (x, y)"),
        (X * np.nan, "sample 0 of mine holds NaN; repair it or leave it out (--skip-broken)"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(data: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        given(data)
    assert str(caught.value) == message


def test_a_sample_that_raises_is_one_line() -> None:
    class Broken(Pairs):
        def __getitem__(self, index: int) -> Any:
            raise RuntimeError("no sample")

    with pytest.raises(DataError) as caught:
        given(Broken([0]))
    assert str(caught.value) == "sample 0 of mine cannot be read: RuntimeError: no sample; repair it"

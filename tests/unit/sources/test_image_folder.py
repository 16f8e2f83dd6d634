"""Image folders as data: what is read, and what is refused."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.datasets import NOWHERE, everything
from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.datasets import Dataset, find_dataset


def write_images(folder: Path, classes: Iterable[str], num: int = 2, size: tuple[int, int] = (5, 4), mode: str = "RGB") -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(num):
            colour = (ord(name[0]), number, 7) if mode == "RGB" else ord(name[0])
            Image.new(mode, size, colour).save(folder / name / f"{number}.png")


def find(folder: Path, **options: Any) -> Dataset:
    return find_dataset(f"imagefolder:{folder}", NOWHERE, "image3", **options)


def labels_of(split: Any) -> list[int]:
    return everything(split)[1].tolist()


# Parts.


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "valid", None),
        ("training", None, "TEST"),
    ],
)
def test_all_parts_are_what_they_are_called(train: str, val: str | None, test: str | None, tmp_path: Path) -> None:
    write_images(tmp_path / train, "bac")
    for name, classes in ((val, "cb"), (test, "ca")):
        if name is not None:
            write_images(tmp_path / name, classes, num=1)
    (tmp_path / train / "notes.txt").write_text("no image")
    (tmp_path / train / "a" / "notes.txt").write_text("no image")
    (tmp_path / "annotations").mkdir()
    dataset = find(tmp_path)
    x, labels = everything(dataset.train)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert x.shape == (6, 3, 4, 5)
    assert torch.equal(x[3, :, 0, 0], torch.tensor([ord("b"), 1, 7]) / 255)
    assert (dataset.val and labels_of(dataset.val)) == (None if val is None else [1, 2])
    assert (dataset.test and labels_of(dataset.test)) == (None if test is None else [0, 2])
    assert dataset.num_classes == 3
    assert dataset.preprocessing == "decoded to RGB, uint8 / 255, HWC to CHW"


def test_every_part_is_in_the_fingerprint(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        write_images(tmp_path / part, "ab", num=1)
    prints = {find(tmp_path).fingerprint}
    for part in ("train", "val", "test"):
        Image.new("RGB", (5, 4), 9).save(tmp_path / part / "a" / "0.png")
        prints.add(find(tmp_path).fingerprint)
    (tmp_path / "val").rename(tmp_path / "away")
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "away").rename(tmp_path / "test")
    prints.add(find(tmp_path).fingerprint)
    assert len(prints) == 5


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train", "training"], r"holds 'train' and 'training', which both name the training part; keep one"),
        (["train", "VAL", "valid"], r"holds 'VAL' and 'valid', which both name the validation part"),
        (["val", "test"], r"holds 'test', 'val' and no training part; name the folder of training images .*/train$"),
        (
            ["train", "holdout"],
            r"holds 'train', which names a part of the data, beside 'holdout', which holds images; move these .* 'train' is a class",
        ),
        (
            ["fold1", "holdout"],
            r"holds 'fold1', 'holdout', in which folders have the same names \('a', 'b'\), so .*; name parts train, val and test",
        ),
        (["all"], r"holds one folder, 'all', with the folders 'a', 'b' in it; where these are the classes, give .*/all$"),
    ],
)
def test_parts_that_are_not_clear_are_refused(folders: list[str], message: str, tmp_path: Path) -> None:
    for folder in folders:
        write_images(tmp_path / folder, "ab")
    with pytest.raises(DataError, match=message) as raised:
        find(tmp_path)
    assert "\n" not in str(raised.value)


def test_class_folders_with_a_folder_of_one_name_each_are_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, ["images"])
    assert labels_of(find(tmp_path).train) == [0, 0, 1, 1]


def test_a_class_that_only_one_part_has_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "ab")
    write_images(tmp_path / "val", "abc")
    with pytest.raises(DataError, match=r"val/c is a class without training images; the classes are a, b"):
        find(tmp_path)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(
        DataError, match=r"train/c holds 0 images \(.*\), and would be a class that nothing is learnt of; put images"
    ):
        find(tmp_path)


# What is no image, and links.


def test_what_systems_leave_behind_is_not_looked_at(tmp_path: Path) -> None:
    write_images(tmp_path, "ab")
    for litter in (
        "a/._0.png",
        "a/Thumbs.db",
        "a/.DS_Store",
        "__MACOSX/a/0.png",
        ".hidden/0.png",
        "b/.thumbs/0.png",
        "notes.txt",
    ):
        (tmp_path / litter).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / litter).write_text("no image")
    assert labels_of(find(tmp_path).train) == [0, 0, 1, 1]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", "ab")
    root = tmp_path / "data"
    write_images(root, "c")
    for name in "ab":
        (root / name).symlink_to(tmp_path / "elsewhere" / name)
    (root / "a" / "again").symlink_to(root / "a")
    (root / "b" / "up").symlink_to(root)
    (root / "c" / "round").symlink_to(root / "c" / "round")
    with pytest.raises(DataError, match=r"data/c/round is a link that leads nowhere \(.*\); mend or remove it"):
        find(root)
    (root / "c" / "round").unlink()
    assert labels_of(find(root).train) == [0, 0, 1, 1, 2, 2]
    (root / "d").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"data/d is a link that leads nowhere \(.*/gone\); mend or remove it"):
        find(root)


def test_image_folders_without_a_test_part(tmp_path: Path) -> None:
    write_images(tmp_path, "ab", mode="L")
    dataset = find_dataset(f"imagefolder:{tmp_path}", NOWHERE, "flat")
    assert dataset.test is None
    assert everything(dataset.train)[0].shape == (4, 60)
    before = dataset.fingerprint
    Image.new("L", (5, 4), 1).save(tmp_path / "a" / "0.png")
    assert find_dataset(f"imagefolder:{tmp_path}", NOWHERE, "flat").fingerprint != before


def test_image_folder_faults_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*/none; give imagefolder:DIR"):
        find(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no folders; put the images of each class in a folder of its own"):
        find(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r"is empty: its folders hold 0 images"):
        find(tmp_path)


def test_an_image_that_changes_during_training_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, "ab")
    split = find(tmp_path).train
    (tmp_path / "b" / "1.png").write_bytes(b"\x89PNG broken")
    Image.new("RGB", (6, 4)).save(tmp_path / "b" / "0.png")
    assert len(split.batch([0, 1])[1]) == 2
    with pytest.raises(
        DataError, match=r"/b/1.png cannot be read as an image \(.*\); repair or remove it, or begin again with --skip-broken$"
    ):
        split.batch([0, 3])
    with pytest.raises(DataError, match=r"/b/0.png is 6 x 4 pixels, and was 5 x 4 when training began; bring it back"):
        split.batch([2])


# Broken images.


def test_every_part_is_looked_at_before_training(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        write_images(tmp_path / part, "ab", num=3)
    for broken in ("test/b/1.png", "val/a/0.png", "test/a/2.png"):
        (tmp_path / broken).write_bytes((tmp_path / broken).read_bytes()[:40])
    with pytest.raises(
        DataError,
        match=r"val/a/0.png cannot be read as an image \(.+\); repair or remove it; 3 of 18 images cannot be used, --skip-broken",
    ) as raised:
        find(tmp_path)
    assert "\n" not in str(raised.value)
    dataset = find(tmp_path, skip_broken=True)
    assert dataset.val is not None
    assert dataset.test is not None
    assert [labels_of(part) for part in (dataset.train, dataset.val, dataset.test)] == [
        [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1],
    ]  # fmt: skip
    assert dataset.skipped_samples == {
        "count": 3,
        "names": [f"{tmp_path}/{name}" for name in ("val/a/0.png", "test/a/2.png", "test/b/1.png")],
    }


def test_images_of_another_size_than_most_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, "a", num=1, size=(6, 4))
    write_images(tmp_path, "bc")
    (tmp_path / "a" / "1.png").write_bytes((tmp_path / "b" / "1.png").read_bytes())
    with pytest.raises(
        DataError,
        match=r"/a/0.png is 6 x 4 pixels, .*/a/1.png is 5 x 4; give all images one size, or --image-size 4; 1 of 6 images "
        r"cannot be used, --skip-broken",
    ):
        find(tmp_path)
    dataset = find(tmp_path, skip_broken=True)
    assert labels_of(dataset.train) == [0, 1, 1, 2, 2]
    assert dataset.skipped_samples == {"count": 1, "names": [f"{tmp_path}/a/0.png"]}


def test_images_of_all_sizes_are_not_to_be_left_out(tmp_path: Path) -> None:
    for number, name in enumerate("abcd"):
        write_images(tmp_path, name, num=1, size=(4 + number, 4))
    with pytest.raises(
        DataError,
        match=r"/b/0.png is 5 x 4 pixels, .*/a/0.png is 4 x 4; give all images one size, or --image-size 4; 3 of 4 images .* used$",
    ):
        find(tmp_path)


def test_a_body_that_no_header_tells_of_is_found_by_decoding(tmp_path: Path) -> None:
    write_images(tmp_path, "ab", num=3)
    path = tmp_path / "b" / "1.png"
    damaged = bytearray(path.read_bytes())
    place = damaged.index(b"IDAT") + 4
    damaged[place : place + 8] = b"\xff" * 8
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"b/1.png cannot be read as an image \(.+\); repair or remove it, or begin"):
        everything(find(tmp_path).train)
    dataset = find(tmp_path, skip_broken=True)
    assert labels_of(dataset.train) == [0, 0, 0, 1, 1]
    assert list(dataset.skipped) == [str(path)]
    assert dataset.fingerprint != find(tmp_path).fingerprint


def test_a_class_of_broken_images_alone_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "ab", num=1)
    (tmp_path / "b" / "0.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"b/0.png cannot be read as an image \(the file is empty\); .*; 1 of 2 images cannot be used$"
    ):
        find(tmp_path)
    with pytest.raises(DataError, match=r"class 'b' of .* has no image left without the broken ones, such as .*/b/0.png; repair"):
        find(tmp_path, skip_broken=True)


# Presentation.


def test_one_deep_image_makes_all_of_them_deep(tmp_path: Path) -> None:
    write_images(tmp_path, "a", mode="L")
    (tmp_path / "b").mkdir()
    values = np.array([[5047, 64994], [0, 65535]], dtype=np.uint16).repeat(2, 0).repeat(3, 1)[:4, :5]
    Image.fromarray(values).save(tmp_path / "b" / "0.png")
    dataset = find(tmp_path)
    assert dataset.preprocessing == "decoded to RGB, 8-bit values / 255, 16-bit values / 65535, HWC to CHW"
    x, _ = everything(dataset.train)
    assert torch.equal(x[2, 1], torch.from_numpy((values / 65535).astype(np.float32)))
    assert torch.equal(x[0], torch.full((3, 4, 5), ord("a")) / 255)
    flat = find_dataset(f"imagefolder:{tmp_path}", NOWHERE, "any")
    assert (flat.sample_shape, flat.dtype) == ((3, 4, 5), torch.float32)


def test_what_was_done_to_pixels_is_said(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "ab")
    write_images(tmp_path / "test", "a")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (5, 4)).save(tmp_path / "train" / "b" / "0.png", exif=exif)
    Image.new("RGBA", (5, 4)).save(tmp_path / "test" / "a" / "0.png")
    assert find(tmp_path).preprocessing == (
        "decoded to RGB, transparency left out, turned as their EXIF data say, uint8 / 255, HWC to CHW"
    )

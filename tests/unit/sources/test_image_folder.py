"""Image folders as data: what is read, and what is refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.datasets import NOWHERE, everything
from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.datasets import Dataset, find_dataset


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

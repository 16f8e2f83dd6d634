"""Resizing: the same pixels as torchvision's transforms, for images in files, in arrays and in data sets, of one size or of many."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from helpers.datasets import NOWHERE, Pairs, everything, image_bytes, save
from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.datasets import find_dataset
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.resize import Resize

# Height and width of images, and the rows and columns that a wide, a tall and a square one have.
SIZES = [(20, 31), (31, 20), (16, 16), (7, 9), (40, 13)]


def expected(image: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """What torchvision's own transforms make of an image (C, H, W)."""
    height, width = size
    if mode == "squash":
        return v2.Resize([height, width], antialias=True)(image)
    if mode == "crop" and height == width:
        return v2.Compose([v2.Resize(height, antialias=True), v2.CenterCrop(height)])(image)
    ratios = height / image.shape[1], width / image.shape[2]
    ratio = max(ratios) if mode == "crop" else min(ratios)
    between = [
        side if own == ratio else max(1, int(side_of * ratio + 1e-9))
        for side, own, side_of in zip(size, ratios, image.shape[1:], strict=True)
    ]
    resized = v2.Resize(between, antialias=True)(image)
    if mode == "crop":
        return v2.CenterCrop([height, width])(resized)
    left, top = (width - between[1]) // 2, (height - between[0]) // 2
    return v2.Pad([left, top, width - between[1] - left, height - between[0] - top])(resized)


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(16, 16), (12, 18), (32, 9)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pixels_are_those_of_torchvision(mode: Any, size: tuple[int, int], dtype: torch.dtype) -> None:
    for height, width in SIZES:
        images = torch.from_numpy(image_bytes((3, height, width), num=2))
        images = images if dtype == torch.uint8 else images / 255
        both = Resize(*size, mode)(images)
        assert both.shape == (2, 3, *size)
        for image, made in zip(images, both, strict=True):
            assert torch.equal(made, expected(image, size, mode))
            assert torch.equal(made, Resize(*size, mode)(image[None])[0]), "one image alone gives the same"


def files(folder: Path) -> list[np.ndarray]:
    """Write an image of each size, in two classes, and return them in the order of the data set."""
    images = [image_bytes((*size, 3), num=1)[0] for size in SIZES]
    for number, image in enumerate(images):
        place = folder / ("a" if number < 2 else "b") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    return images


def test_a_folder_of_images_of_all_sizes_is_taken(tmp_path: Path) -> None:
    images = files(tmp_path)
    dataset = find_dataset(f"imagefolder:{tmp_path}", NOWHERE, "image3", resize=Resize(12, 12, "crop"))
    x, _ = everything(dataset.train)
    for image, made in zip(images, x, strict=True):
        assert torch.equal(made, expected(torch.from_numpy(image).movedim(-1, 0), (12, 12), "crop") / 255)
    assert dataset.preprocessing == (
        "decoded to RGB, shorter side resized to 12 (bilinear, antialiased), centre 12x12 kept, uint8 / 255, HWC to CHW"
    )


def test_a_turned_image_is_resized_as_it_is_shown(tmp_path: Path) -> None:
    image = image_bytes((20, 31, 3), num=1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    Image.fromarray(image).save(tmp_path / "a" / "0.png", exif=exif)
    x, _ = everything(find_dataset(f"imagefolder:{tmp_path}", NOWHERE, "any", resize=Resize(12, 8, "squash")).train)
    shown = torch.from_numpy(np.rot90(image, -1).copy()).movedim(-1, 0)
    assert torch.equal(x[0], expected(shown, (12, 8), "squash") / 255)


def test_grey_images_of_16_bits_keep_them(tmp_path: Path) -> None:
    grey = (np.arange(12 * 16).reshape(12, 16) * 300).astype(np.uint16)
    (tmp_path / "a").mkdir()
    Image.fromarray(grey).save(tmp_path / "a" / "0.png")
    dataset = find_dataset(f"imagefolder:{tmp_path}", NOWHERE, "any", resize=Resize(6, 6, "squash"))
    values = torch.from_numpy((grey.astype(np.float64) / 65535).astype(np.float32)).expand(3, -1, -1)
    assert torch.equal(everything(dataset.train)[0][0], expected(values.contiguous(), (6, 6), "squash"))
    assert dataset.preprocessing == "decoded to RGB, 16-bit values / 65535, resized to 6x6 (bilinear, antialiased), HWC to CHW"


@pytest.mark.parametrize(("shape", "axes"), [((20, 31), None), ((20, 31, 3), -1), ((3, 20, 31), 0)])
@pytest.mark.parametrize("form", ["array", "map", "npz"])
def test_arrays_are_resized_whatever_their_axes(shape: tuple[int, ...], axes: int | None, form: str, tmp_path: Path) -> None:
    images = image_bytes(shape, num=4)
    resize, y = Resize(12, 8, "pad"), np.arange(4)
    if form == "npz":
        made = everything(find_dataset(save(tmp_path / "a.npz", x_train=images, y_train=y), NOWHERE, "any", resize=resize).train)[
            0
        ]
    else:
        data = (images, y) if form == "array" else Pairs(list(zip(images, y.tolist(), strict=True)))
        made = everything(from_torch(data, resize=resize))[0]
    for image, own in zip(images, made, strict=True):
        chw = torch.from_numpy(image)[None] if axes is None else torch.from_numpy(image).movedim(axes, 0)
        assert torch.equal(own, expected(chw, (12, 8), "pad") / 255)


def test_a_data_set_of_images_of_all_sizes_is_taken() -> None:
    images = [Image.fromarray(image_bytes((*size, 3), num=1)[0]) for size in SIZES]
    items = Pairs([(image, number) for number, image in enumerate(images)])
    x, _ = everything(from_torch(items, resize=Resize(9, 9, "crop")))
    for image, made in zip(images, x, strict=True):
        assert torch.equal(made, expected(torch.from_numpy(np.array(image)).movedim(-1, 0), (9, 9), "crop") / 255)
    with pytest.raises(
        DataError, match=r"sample 1 .* is \(31, 20, 3\) .*; give all samples one shape and dtype, or .* --image-size"
    ):
        everything(from_torch(items))
    mixed = Pairs([*items.items, (Image.new("RGBA", (9, 9)), 0)])
    with pytest.raises(
        DataError, match=r"sample 5 of the data set is \(9, 9, 4\) torch.uint8, sample 0 is \(9, 9, 3\) torch.uint8"
    ):
        everything(from_torch(mixed, resize=Resize(9, 9, "crop")))
    assert len(from_torch(mixed, resize=Resize(9, 9, "crop"), skip_broken=True)) == 5


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 5), r"the data set: samples have shape \(5,\), and --image-size is for images \(height, width\)"),
        (
            torch.zeros(1, 3, 1, 9000, dtype=torch.uint8),
            r"the data set: a sample is 9000 x 1 pixels, and would have 2016000 x 224 before it is cropped to 224 x 224; crop it, or give "
            "--resize squash or pad",
        ),
    ],
)
def test_what_cannot_be_resized_is_refused(x: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_torch((x, torch.zeros(len(x))), resize=Resize(224, 224, "crop"))


def test_a_long_thin_file_is_named(tmp_path: Path) -> None:
    files(tmp_path)
    Image.new("RGB", (9000, 1)).save(tmp_path / "a" / "thin.png")
    with pytest.raises(DataError, match=r"/a/thin.png is 9000 x 1 pixels, and would have .*; 1 of 6 images cannot be used"):
        find_dataset(f"imagefolder:{tmp_path}", NOWHERE, "any", resize=Resize(224, 224, "crop"))

"""Images with masks beside them: pairs, sizes, classes, and how masks go where their images go."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from helpers.datasets import Pairs, everything, image_bytes, save
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.workload.inputs import open_data, python_inputs

SIZES = [(12, 17), (17, 12), (10, 10)]


def masks_of(images: list[np.ndarray]) -> list[np.ndarray]:
    """A class for each pixel, which follows from its colour; the corner is left out."""
    masks = [(image[:, :, 0] // 64).astype(np.uint8) for image in images]
    for mask in masks:
        mask[0, 0] = 255
    return masks


def write(folder: Path, sizes: Any = SIZES, mode: str = "L") -> tuple[list[np.ndarray], list[np.ndarray]]:
    images = [image_bytes((*size, 3), num=1)[0] for size in sizes]
    masks = masks_of(images)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        Image.fromarray(image).save(folder / "images" / f"{number}.bmp")
        picture = Image.fromarray(mask)
        if mode == "P":
            picture.putpalette([7] * 768)
        picture.save(folder / "masks" / f"{number}.png")
    return images, masks


def opened(folder: Path, **options: Any) -> Any:
    given = {"val_fraction": 0, **options}
    return open_data(configure(max_gpu_mem="100MB", model="resnet18", data=f"segmentation:{folder}", device="cpu", **given))


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_are_class_numbers_or_places_in_a_palette(mode: str, tmp_path: Path) -> None:
    images, masks = write(tmp_path, [(9, 8)] * 3, mode)
    dataset = opened(tmp_path)[1]
    x, y = everything(dataset.train)
    assert torch.equal(x, torch.from_numpy(np.stack(images)).movedim(-1, 1) / 255)
    assert torch.equal(y, torch.from_numpy(np.stack(masks)))
    targets = dataset.targets
    assert (targets.kind, targets.num_classes, targets.shape, targets.dtype, targets.ignored) == (
        "mask",
        4,
        (9, 8),
        torch.uint8,
        255,
    )


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_masks_are_resized_by_the_nearest_pixel_and_cropped_alike(mode: Any, tmp_path: Path) -> None:
    _, masks = write(tmp_path)
    _, y = everything(opened(tmp_path, image_size=8, resize=mode)[1].train)
    for mask, made in zip(masks, y, strict=True):
        rows, columns = Resize(8, 8, mode).between(*mask.shape)
        resized = v2.Resize([rows, columns], interpolation=InterpolationMode.NEAREST)(torch.from_numpy(mask)[None])
        if mode == "pad":
            left, top = (8 - columns) // 2, (8 - rows) // 2
            resized = v2.Pad([left, top, 8 - columns - left, 8 - rows - top], fill=255)(resized)
        assert torch.equal(made, v2.CenterCrop(8)(resized)[0])


@pytest.mark.parametrize("form", ["array", "channels last", "map"])
def test_masks_of_other_sources_are_resized_too(form: str, tmp_path: Path) -> None:
    images = [image_bytes((12, 17, 3), num=1)[0]] * 3
    masks = masks_of(images)
    resize = Resize(8, 8, "crop")
    if form == "map":
        items = [(Image.fromarray(image), Image.fromarray(mask).convert("P")) for image, mask in zip(images, masks, strict=True)]
        _, y = everything(from_torch(Pairs(items), resize=resize))
    else:
        x = np.stack(images) if form == "channels last" else np.stack(images).transpose(0, 3, 1, 2)
        _, y = everything(from_torch((x, np.stack(masks)), resize=resize))
    assert torch.equal(y, resize.masks(torch.from_numpy(np.stack(masks)), 255))


def test_masks_are_cropped_and_flipped_with_their_images(tmp_path: Path) -> None:
    write(tmp_path, [(16, 16)] * 3)
    splits = opened(tmp_path, augment="basic", normalize="0/1")[2]
    for epoch in range(4):
        x, y = splits["train"].batch([0, 1, 2], ("epoch", epoch))
        inside = y != 255
        assert torch.equal((x[:, 0] * 255).round().to(torch.uint8)[inside] // 64, y[inside])
        assert 0 < int((~inside).sum()) < y.numel() // 2
    assert not torch.equal(splits["train"].batch([0], ("epoch", 0))[1], splits["train"].batch([0], ("epoch", 1))[1])
    given = np.zeros((2, 3, 8, 8), np.uint8), np.full((2, 8, 8), 200, np.uint8)
    data = save(tmp_path / "a.npz", x_train=given[0], y_train=given[1])

    def brought(augment: str, ignored: int | None) -> Any:
        options = {"augment": augment, "ignore_index": ignored, "val_fraction": 0}
        return python_inputs(torch.nn.Flatten(), data, None, None)(
            configure(max_gpu_mem="1GB", model="python:a", data=data, **options)
        )

    for ignored in (300, -100):  # which bytes do not hold
        y = brought("basic", ignored)[2]["train"].batch([0, 1], ("epoch", 0))[1]
        assert set(y.unique().tolist()) == {ignored, 200}
    with pytest.raises(
        ConfigError, match=r"--augment trivial is for classes of whole images: .* move no masks; give --augment basic$"
    ):
        brought("trivial", None)


def test_parts_are_found(tmp_path: Path) -> None:
    for part, num in (("Train", 3), ("val", 1), ("testing", 2)):
        write(tmp_path / part, [(8, 8)] * num)
    splits = opened(tmp_path, val_fraction=None)[2]
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "val": 1, "test": 2}


def without(folder: Path, name: str) -> None:
    (folder / "masks" / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: without(folder, "1.png"),
            r"1 of 3 images of .* have no mask, such as .*/images/1.bmp; put it at .*/masks/1.png$",
        ),
        (
            lambda folder: (folder / "masks").rename(folder / "mask"),
            r" holds 'images', 'mask'; give segmentation:DIR with the folders images",
        ),
        (
            lambda folder: Image.new("RGB", (8, 8)).save(folder / "masks" / "1.png"),
            r"/masks/1.png is of mode RGB, and a mask holds class numbers; store it as grey values or with a palette; 1 of 3 images",
        ),
        (
            lambda folder: Image.new("L", (9, 8)).save(folder / "masks" / "1.png"),
            r"/masks/1.png is 9 x 8 pixels, and its image 8 x 8; give both one size; 1 of 3 images cannot be used, --skip-broken leaves",
        ),
        (
            lambda folder: (folder / "masks" / "1.png").write_bytes(b"no"),
            r"/masks/1.png cannot be read as a mask \(UnidentifiedImageError",
        ),
        (
            lambda folder: [Image.new("L", (8, 8), 255 * (n < 1)).save(folder / "masks" / f"{n}.png") for n in range(3)],
            r"the masks of .* hold 0 and 255 alone, and 255 is left out by custom; store what is to be found as 1, or, where nothing is left",
        ),
    ],
)
def test_what_is_no_pair_is_said_in_a_line(spoil: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, [(8, 8)] * 3)
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path)


def test_broken_pairs_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, [(8, 8)] * 3)
    (tmp_path / "masks" / "1.png").write_bytes(b"no")
    dataset = opened(tmp_path, skip_broken=True)[1]
    assert (len(dataset.train), dataset.skipped_samples["count"]) == (2, 1)
    with pytest.raises(
        ConfigError, match=r"has a class for each pixel, and --task regression needs other targets; leave it out$"
    ):
        opened(tmp_path, task="regression")

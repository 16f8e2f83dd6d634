"""Mask folders: images, and beside them masks with a class number for each pixel, paired by their names.

    DIR/images/1.jpg     DIR/masks/1.png        or the same two folders in DIR/train, DIR/val and DIR/test

Every header and every mask is read before training, so that what cannot be used is found then, and classes are counted.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.errors import DataError, LowMemError
from lowmem_pnn.sources.dataset import Dataset, join_parts
from lowmem_pnn.sources.image_file import ImageHeader, decode, decoding_bytes, words_of
from lowmem_pnn.sources.image_folder import (
    ImagePart,
    images_below,
    look_at,
    named_parts,
    subfolders,
)
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.sources.preprocessing import InputForm, Preprocessing
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.sources.splits import SampleSplit
from lowmem_pnn.sources.targets import MASK_IGNORED, TargetOptions, Targets

_IMAGES, _MASKS = "images", "masks"
# Modes of Pillow whose values are numbers, or places in a palette.
_MODES = frozenset({"1", "L", "P", "I;16", "I;16B", "I;16L", "I"})
_FORM = "segmentation:DIR with the folders images and masks, or these in train, val and test"


def has_masks(folder: Path) -> bool:
    """Decide whether a folder, or a part in it, has a folder of masks.

    Args:
        folder: The folder, which need not exist.
    """
    if not folder.is_dir():
        return False
    below = subfolders(folder)
    return any(
        path.name.lower() == _MASKS for place in (folder, *below) for path in (below if place == folder else subfolders(place))
    )


def open_mask_folder(
    folder: Path, input_form: InputForm, options: TargetOptions, *, skip_broken: bool = False, resize: Resize | None = None
) -> Dataset:
    """Open a folder of images and masks.

    Args:
        folder: Folder with `images` and `masks`, or with parts that have these.
        input_form: Form of the samples that the model takes.
        options: What is known of the masks: the class number that is left out.
        skip_broken: Leave out what cannot be used, instead of raising.
        resize: Brings images and masks to one size; None where all have one size.

    Raises:
        DataError: There are no such folders, an image has no mask, or an image or a mask cannot be used.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder.absolute()}; give {_FORM}")
    if options.task not in ("auto", "segmentation", "own"):
        raise DataError(
            f"data segmentation:{folder} has a class for each pixel, and --task {options.task} needs other targets; leave it out"
        )
    parts: dict[str, ImagePart] = {}
    masks: dict[Path, Path] = {}
    for name, place in _places(folder).items():
        parts[name], own = _list_part(place)
        masks |= own
    headers, broken = look_at(parts, skip_broken, resize)
    ignored = MASK_IGNORED if options.ignored is None else options.ignored
    values = np.zeros(0, dtype=np.int64)
    for path, header in headers.items():
        if path in broken:
            continue
        try:
            found = np.unique(_read_mask(masks[path], header))
        except DataError as error:
            broken[path] = str(error)
            continue
        values = np.union1d(values, found)
    if broken and not skip_broken:
        total = sum(len(part.paths) for part in parts.values())
        reason = next(iter(broken.values()))
        raise DataError(f"{reason}; {len(broken):,} of {total:,} images cannot be used, --skip-broken leaves them out")
    parts = {name: part.without(broken) for name, part in parts.items()}
    for part in parts.values():
        if not part.paths:
            raise DataError(
                f"{part.folder} has no image left without the broken ones, such as {next(iter(broken))}; repair some of them"
            )
    if values.tolist() == [0, 255] and options.ignored is None:
        raise DataError(
            f"the masks of {folder} hold 0 and 255 alone, and 255 is left out by custom; store what is to be found as 1, or, where nothing is "
            "left out, give --ignore-index -100"
        )
    counted = values[values != ignored]
    largest = int(counted.max()) if len(counted) else 0
    dtype = torch.uint8 if largest < 256 and 0 <= ignored < 256 else torch.int64
    used = [headers[path] for part in parts.values() for path in part.paths]
    deep = any(header.bits > 8 for header in used)
    shape = (used[0].height, used[0].width)
    targets = Targets("mask", largest + 1, shape, dtype, ignored).of_size(resize)
    splits = {name: MaskFolderSplit(part, masks, targets, used[0], deep, input_form, resize) for name, part in parts.items()}
    dataset = join_parts(
        folder.resolve().name,
        splits["train"],
        splits.get("test"),
        splits.get("val"),
        first_steps=words_of(used),
        skipped={str(path): reason for path, reason in broken.items()},
    )
    return dataclasses.replace(dataset, decoding_bytes=0 if resize is None else decoding_bytes(used))


class MaskFolderSplit(SampleSplit):
    """Split of image files with masks beside them.

    Args:
        part: Its image files.
        masks: Mask of each image file.
        targets: Form of the masks, as the model is shown them.
        header: Header of any of the images: all have one size, unless they are resized.
        deep: Whether images of more than 8 bits a value are among those of the data set.
        input_form: Form of the samples that the model takes.
        resize: Brings images and masks to one size; None to leave them as they are.
    """

    paths: tuple[Path, ...]

    def __init__(
        self,
        part: ImagePart,
        masks: dict[Path, Path],
        targets: Targets,
        header: ImageHeader,
        deep: bool,
        input_form: InputForm,
        resize: Resize | None,
    ) -> None:
        super().__init__(len(part.paths))
        self.where, self.targets = str(part.folder), targets
        self.paths, self._masks = part.paths, [masks[path] for path in part.paths]
        self._deep, self._resize = deep, resize
        shape = (header.height, header.width, 3)
        self.preprocessing = Preprocessing.choose(
            shape, torch.float32 if deep else torch.uint8, input_form, self.where, layout="HWC", resize=resize
        )

    def fingerprint(self) -> str:
        """Return a hash of all paths, sizes and times of change."""
        digest = hashlib.sha256()
        for path in (*self.paths, *self._masks):
            status = path.stat()
            digest.update(
                f"{path.relative_to(self.where)} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
        return digest.hexdigest()

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """See `SampleSplit.labels`."""
        return torch.stack([self._mask(int(number)) for number in self._kept[numbers]])

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        expected = self.preprocessing
        x = torch.empty(len(numbers), *expected.raw_shape, dtype=expected.raw_dtype)
        for row, number in enumerate(numbers):
            pixels = expected.resized(torch.from_numpy(decode(self.paths[number], self._deep))[None])[0]
            if pixels.shape != expected.raw_shape:
                raise DataError(f"{self.paths[number]} is of another size than when training began; bring it back")
            x[row] = pixels
        return x, torch.stack([self._mask(int(number)) for number in numbers])

    def _mask(self, number: int) -> Tensor:
        mask = torch.from_numpy(_read_mask(self._masks[number], None))
        if self._resize is not None:
            mask = self._resize.masks(mask, self.targets.outside)
        return self.targets.convert(mask, f"mask {self._masks[number]}", batched=False)

    def _name(self, number: np.int64) -> str:
        return str(self.paths[number])


def _places(folder: Path) -> dict[str, Path]:
    """Return the folder of each part, which holds images and masks."""
    parts, others = named_parts(folder)
    if {_IMAGES, _MASKS} <= {path.name.lower() for path in others}:
        return {"train": folder}
    if "train" not in parts:
        there = ", ".join(repr(path.name.lower()) for path in subfolders(folder)[:6]) or "no folders"
        raise DataError(f"{folder} holds {there}; give {_FORM}")
    return parts


def _list_part(place: Path) -> tuple[ImagePart, dict[Path, Path]]:
    """List the images of a part, and the mask of each: of the same name, but for its ending."""
    names = {path.name.lower(): path for path in subfolders(place)}
    for name in (_IMAGES, _MASKS):
        if name not in names:
            raise DataError(f"{place} has no folder {name}; put {name} there: {place / name}")
    images, masks = (images_below(names[name], place) for name in (_IMAGES, _MASKS))
    if not images:
        raise DataError(f"{names[_IMAGES]} is empty: it holds 0 images; give at least 1")
    by_stem: dict[Path, Path] = {}
    for path in masks:
        stem = path.relative_to(names[_MASKS]).with_suffix("")
        if stem in by_stem:
            raise DataError(f"{by_stem[stem]} and {path} are masks of one image; keep one of them")
        by_stem[stem] = path
    pairs = {path: by_stem.get(path.relative_to(names[_IMAGES]).with_suffix("")) for path in images}
    without = [path for path, mask in pairs.items() if mask is None]
    if without:
        mask = names[_MASKS] / without[0].relative_to(names[_IMAGES]).with_suffix(".png")
        raise DataError(
            f"{len(without):,} of {len(images):,} images of {place} have no mask, such as {without[0]}; put it at {mask}"
        )
    return ImagePart(place, tuple(images), (0,) * len(images)), {path: mask for path, mask in pairs.items() if mask is not None}


def _read_mask(path: Path, header: ImageHeader | None) -> npt.NDArray[Any]:
    """Read a mask.

    Args:
        path: Path of the file.
        header: Header of its image, which has to be of the same size; None where that was seen before.

    Returns:
        Class numbers (H, W), uint8 or int32.

    Raises:
        DataError: It cannot be read, is of another size than its image, or holds colours.
    """
    from PIL import Image

    try:
        with path.open("rb") as stream, Image.open(stream) as image:
            mode = image.mode
            if mode in _MODES:
                array = np.asarray(image)
                mask = array.astype(np.uint8 if array.dtype in (np.bool_, np.uint8) else np.int32)
    except (LowMemError, MemoryError):
        raise
    # Pillow's readers raise nearly anything for nonsense.
    except Exception as error:
        raise DataError(f"{path} cannot be read as a mask ({one_line(error)}); repair it") from error
    if mode not in _MODES:
        raise DataError(f"{path} is of mode {mode}, and a mask holds class numbers; store it as grey values or with a palette")
    if header is not None and mask.shape != (header.height, header.width):
        raise DataError(
            f"{path} is {mask.shape[1]} x {mask.shape[0]} pixels, and its image {header.width} x {header.height}; give both one size"
        )
    return mask

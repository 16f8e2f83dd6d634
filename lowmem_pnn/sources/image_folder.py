"""Image folders: training, validation and test parts of image files, one folder for each class, decoded when a sample is asked for.

    DIR/train/CLASS/...   or   DIR/CLASS/...     parts are found by name, in any case; without parts all of it is for training
    DIR/val/CLASS/...
    DIR/test/CLASS/...

Every header is read before training, so that a file that cannot be used is found then.
"""

import dataclasses
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.dataset import Dataset, join_parts
from lowmem_pnn.sources.image_file import ImageHeader, decode, decoding_bytes, read_header, words_of
from lowmem_pnn.sources.imports import listed
from lowmem_pnn.sources.preprocessing import InputForm, Preprocessing
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.sources.splits import SampleSplit
from lowmem_pnn.sources.targets import PYTORCH_IGNORED, Targets

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
PARTS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
PART_WORDS = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class ImagePart:
    """Image files of one part, in the order of class and path, and the class number of each."""

    folder: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def without(self, broken: Mapping[Path, str]) -> "ImagePart":
        kept = [(path, label) for path, label in zip(self.paths, self.labels, strict=True) if path not in broken]
        return ImagePart(self.folder, tuple(path for path, _ in kept), tuple(label for _, label in kept))


def open_image_folder(folder: Path, input_form: InputForm, skip_broken: bool = False, resize: Resize | None = None) -> Dataset:
    """Open a folder of class folders, or a folder of parts with class folders, and read the header of every image.

    Args:
        folder: Folder that holds class folders, or parts: `train` or `training`; `val`, `valid` or `validation`; `test` or
            `testing`; in any case. Class folders hold images at any depth; links are followed, hidden files and folders are not.
        input_form: Form of the samples that the model takes.
        skip_broken: Decode every image once, and leave out those that cannot be used, instead of raising.
        resize: Brings images to one size; None where all have one size.

    Raises:
        DataError: It is not clear which folders are parts and which are classes; a class has no images; or an image cannot be used.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder.absolute()}; give imagefolder:DIR with a folder of images for each class")
    folders = _part_folders(folder)
    classes = [path.name for path in _class_folders(folders["train"])]
    parts = {name: _list_part(path, classes, is_training=name == "train") for name, path in folders.items()}
    headers, broken = look_at(parts, skip_broken, resize)
    if broken:
        first, reason = next(iter(broken.items()))
        if not skip_broken:
            total = sum(len(part.paths) for part in parts.values())
            # Where images are of all sizes, next to none would be left.
            hint = ", --skip-broken leaves them out" if 2 * len(broken) < total else ""
            raise DataError(f"{reason}; {len(broken):,} of {total:,} images cannot be used{hint}")
        parts = {name: part.without(broken) for name, part in parts.items()}
        for name, part in parts.items():
            missing = sorted(set(range(len(classes)) if name == "train" else ()) - set(part.labels))
            if missing or not part.paths:
                what = f"class {classes[missing[0]]!r} of {part.folder}" if missing else f"{part.folder}"
                raise DataError(f"{what} has no image left without the broken ones, such as {first}; repair some of them")
    used = [headers[path] for part in parts.values() for path in part.paths]
    deep = any(header.bits > 8 for header in used)
    splits = {
        name: ImageFolderSplit(part.folder, part.paths, part.labels, len(classes), used[0], deep, input_form, resize)
        for name, part in parts.items()
    }
    dataset = join_parts(
        folder.resolve().name,
        splits["train"],
        splits.get("test"),
        splits.get("val"),
        first_steps=words_of(used),
        skipped={str(path): reason for path, reason in broken.items()},
        classes=tuple(classes),
    )
    return dataclasses.replace(dataset, decoding_bytes=0 if resize is None else decoding_bytes(used))


class ImageFolderSplit(SampleSplit):
    """Split of image files.

    Args:
        folder: Folder that all of them are in.
        paths: Paths of the files.
        labels: Class number of each file.
        num_classes: Number of classes.
        header: Header of any of them: all have one size, unless they are resized.
        deep: Whether images of more than 8 bits a value are among those of the data set; all are then decoded to float32.
        input_form: Form of the samples that the model takes.
        resize: Brings images to one size; None to leave them as they are.
    """

    paths: tuple[Path, ...]

    def __init__(
        self,
        folder: Path,
        paths: tuple[Path, ...],
        labels: tuple[int, ...],
        num_classes: int,
        header: ImageHeader,
        deep: bool,
        input_form: InputForm,
        resize: Resize | None = None,
    ) -> None:
        super().__init__(len(paths))
        self.where, self.targets = str(folder), Targets("class", num_classes, ignored=PYTORCH_IGNORED)
        self.paths, self._labels, self._deep = paths, torch.tensor(labels, dtype=torch.int64), deep
        shape = (header.height, header.width, 3)
        self.preprocessing = Preprocessing.choose(
            shape, torch.float32 if deep else torch.uint8, input_form, self.where, layout="HWC", resize=resize
        )

    def fingerprint(self) -> str:
        """Return a hash of all paths, sizes and times of change."""
        digest = hashlib.sha256()
        for path in self.paths:
            status = path.stat()
            digest.update(
                f"{path.relative_to(self.where)} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
        return digest.hexdigest()

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """See `SampleSplit.labels`."""
        return self._labels.index_select(0, torch.from_numpy(self._kept[numbers]))

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        expected = self.preprocessing.raw_shape
        x = torch.empty(len(numbers), *expected, dtype=self.preprocessing.raw_dtype)
        for row, number in enumerate(numbers):
            path = self.paths[number]
            try:
                image = decode(path, self._deep)
            except DataError as error:
                raise DataError(f"{error}, or begin again with --skip-broken") from error
            pixels = self.preprocessing.resized(torch.from_numpy(image)[None])[0]
            if pixels.shape != expected:
                raise DataError(
                    f"{path} is {image.shape[1]} x {image.shape[0]} pixels, and was {expected[1]} x {expected[0]} when training "
                    "began; bring it back"
                )
            x[row] = pixels
        return x, self._labels.index_select(0, torch.from_numpy(numbers))

    def _name(self, number: np.int64) -> str:
        return str(self.paths[number])


def named_parts(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Find the folders that are named as parts are, and all others.

    Args:
        folder: Folder that they are in.

    Returns:
        The folder of each part that is there, in the order of train, val and test; and the other folders.

    Raises:
        DataError: Two folders name one part.
    """
    found: dict[str, list[Path]] = {}
    others = []
    for path in subfolders(folder):
        part = PARTS.get(path.name.lower())
        if part is None:
            others.append(path)
        else:
            found.setdefault(part, []).append(path)
    for part, paths in found.items():
        if len(paths) > 1:
            names = " and ".join(repr(path.name) for path in paths)
            raise DataError(
                f"{folder} holds {names}, which both name the {PART_WORDS[part]} part; keep one, and move the other away"
            )
    return {part: found[part][0] for part in ("train", "val", "test") if part in found}, others


def _part_folders(folder: Path) -> dict[str, Path]:
    """Find the folders of the parts, by name; without parts the folder itself is for training."""
    found, others = named_parts(folder)
    if not found:
        return {"train": folder}
    here = ", ".join(repr(path.name) for path in sorted(found.values()))
    with_images = [path.name for path in others if images_below(path, folder)]
    if with_images:
        raise DataError(
            f"{folder} holds {here}, which {_name_parts(len(found))}, beside {_listed(with_images)}, which {_hold(with_images)} images; "
            f"move these into the parts or away, or, where {here} {'is a class' if len(found) == 1 else 'are classes'}, give it another name"
        )
    if "train" not in found:
        raise DataError(f"{folder} holds {here} and no training part; name the folder of training images {folder / 'train'}")
    return found


def _name_parts(count: int) -> str:
    return "names a part of the data" if count == 1 else "name parts of the data"


def _hold(names: list[str]) -> str:
    return "holds" if len(names) == 1 else "hold"


def _listed(names: list[str]) -> str:
    return listed([*map(repr, names)], 5)


def _class_folders(folder: Path) -> list[Path]:
    """Return the class folders of a part, sorted: positions of the training part's are the class numbers.

    Raises:
        DataError: There are none, or they hold folders of the same names, so that those may be the classes.
    """
    classes = subfolders(folder)
    if not classes:
        raise DataError(
            f"{folder} holds no folders; put the images of each class in a folder of its own: {folder / 'CLASS/1.png'}"
        )
    inner = {path: [sub.name for sub in subfolders(path)] for path in classes}
    if len(classes) == 1:
        (only,) = classes
        if len(inner[only]) > 1 and not _entries(only)[1]:
            raise DataError(
                f"{folder} holds one folder, {only.name!r}, with the folders {_listed(inner[only])} in it; where these are the classes, "
                f"give {only}"
            )
        return classes
    # A single name may be in all of them, as in CLASS/images/1.png; two are classes in parts of unknown names.
    counts = Counter(name for names in inner.values() for name in names)
    shared = sorted(name for name, count in counts.items() if count > 1)
    if len(shared) > 1:
        outer = [path.name for path in classes if set(shared) & set(inner[path])]
        raise DataError(
            f"{folder} holds {_listed(outer)}, in which folders have the same names ({_listed(shared)}), so that either may be the classes; "
            f"name parts train, val and test; where {outer[0]!r} is a class, give the folders in it names that no other class has"
        )
    return classes


def _list_part(folder: Path, classes: list[str], is_training: bool) -> ImagePart:
    """List the images of a part."""
    numbers = {name: number for number, name in enumerate(classes)}
    paths: list[Path] = []
    labels: list[int] = []
    empty = []
    for class_folder in _class_folders(folder):
        images = images_below(class_folder, folder)
        if not images:
            empty.append(class_folder)
            continue
        if class_folder.name not in numbers:
            raise DataError(f"{class_folder} is a class without training images; the classes are {', '.join(classes[:12])}")
        paths += images
        labels += [numbers[class_folder.name]] * len(images)
    if not paths:
        raise DataError(f"{folder} is empty: its folders hold 0 images ({', '.join(sorted(_SUFFIXES))}); give at least 1")
    if empty and is_training:
        raise DataError(
            f"{empty[0]} holds 0 images ({', '.join(sorted(_SUFFIXES))}), and would be a class that nothing is learnt of; put images in "
            "it, or remove it"
        )
    return ImagePart(folder, tuple(paths), tuple(labels))


def images_below(folder: Path, root: Path) -> list[Path]:
    """Return the image files below a folder, sorted; a folder that links lead to again is looked into once."""
    images: list[Path] = []
    seen = {root.resolve(), *root.resolve().parents}
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        real = place.resolve()
        if real in seen:
            continue
        seen.add(real)
        folders, found = _entries(place)
        waiting += folders
        images += found
    return sorted(images)


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, and links to folders, sorted."""
    return _entries(folder)[0]


def images_in(folder: Path) -> list[Path]:
    """Return the image files in a folder itself, sorted."""
    return _entries(folder)[1]


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and the image files in a folder, both sorted, without what is hidden or what systems leave behind.

    Raises:
        DataError: The folder cannot be read, or a link in it that may stand for a folder leads nowhere.
    """
    folders: list[Path] = []
    images: list[Path] = []
    try:
        # Millions of files: their kinds come with their names, where a Path would ask the system for each.
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                suffix = Path(entry.name).suffix.lower()
                if _is_folder(entry):
                    folders.append(folder / entry.name)
                # A link of an image's name that leads nowhere is named with the broken images.
                elif suffix in _SUFFIXES:
                    images.append(folder / entry.name)
                elif not suffix and entry.is_symlink() and not (folder / entry.name).exists():
                    target = (folder / entry.name).readlink()
                    raise DataError(f"{folder / entry.name} is a link that leads nowhere ({target}); mend or remove it")
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}; see to its permissions") from error
    return sorted(folders), sorted(images)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    # A link to itself.
    except OSError:
        return False


def look_at(
    parts: Mapping[str, ImagePart], decodes: bool, resize: Resize | None
) -> tuple[dict[Path, ImageHeader], dict[Path, str]]:
    """Read every header.

    Args:
        parts: Parts of the data set, the training part first.
        decodes: Whether to decode every image too.
        resize: Brings images to one size; None where all have one size.

    Returns:
        Headers of the files that can be used, and what is wrong with the others, in the order of the parts.
    """
    headers: dict[Path, ImageHeader] = {}
    broken: dict[Path, str] = {}
    # Nearly all are alike, and of millions one each would take much memory.
    kinds: dict[ImageHeader, ImageHeader] = {}
    with warnings.catch_warnings():
        # What Pillow says of odd files, line by line; those that cannot be used are named below.
        warnings.simplefilter("ignore")
        for part in parts.values():
            for path in part.paths:
                try:
                    header = read_header(path)
                    if resize is not None and (fault := resize.fault(header.height, header.width)) is not None:
                        raise DataError(f"{path} {fault}")
                    headers[path] = kinds.setdefault(header, header)
                    if decodes:
                        decode(path, deep=False)
                except DataError as error:
                    broken[path] = str(error)
    sizes = Counter((header.width, header.height) for header in headers.values())
    if len(sizes) < 2 or resize is not None:
        return headers, broken
    # The commonest size is the right one: were it the first one's, a single odd image would make all others wrong.
    usual = sizes.most_common(1)[0][0]
    like = next(path for path, header in headers.items() if (header.width, header.height) == usual)
    for path, header in headers.items():
        if (header.width, header.height) != usual:
            broken[path] = (
                f"{path} is {header.width} x {header.height} pixels, {like} is {usual[0]} x {usual[1]}; give all images one size, or "
                f"--image-size {min(usual)}"
            )
    order = [path for part in parts.values() for path in part.paths]
    return headers, {path: broken[path] for path in order if path in broken}

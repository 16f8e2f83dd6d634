"""Image folders: a data split of image files, one folder for each class, decoded when a sample is asked for."""

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.preprocessing import InputForm, Preprocessing
from lowmem_pnn.sources.splits import SampleSplit

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def class_names(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, sorted: their positions are the class numbers.

    Args:
        folder: Folder that holds one folder for each class.

    Raises:
        DataError: There are no folders in it.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(
            f"{folder} holds no folders; put the images of each class in a folder of its own: {folder / 'CLASS/1.png'}"
        )
    return names


class ImageFolderSplit(SampleSplit):
    """Split of the images below a folder, in the order of class and path.

    Args:
        folder: Folder that holds one folder for each class, with images at any depth.
        classes: Class names of the data set; their positions are the labels.
        input_form: Form of the samples that the model takes.

    Raises:
        DataError: There are no images, or a class of the folder is not among `classes`.
    """

    def __init__(self, folder: Path, classes: list[str], input_form: InputForm) -> None:
        numbers = {name: number for number, name in enumerate(classes)}
        self.where, self.num_classes = str(folder), len(classes)
        self._paths: list[Path] = []
        labels: list[int] = []
        for name in class_names(folder):
            if name not in numbers:
                raise DataError(f"{folder / name} is a class without training images; the classes are {', '.join(classes[:12])}")
            paths = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
            self._paths += paths
            labels += [numbers[name]] * len(paths)
        if not self._paths:
            raise DataError(f"{folder} is empty: its folders hold 0 images ({', '.join(sorted(_SUFFIXES))}); give at least 1")
        super().__init__(len(self._paths))
        self._labels = torch.tensor(labels, dtype=torch.int64)
        first = _decode(self._paths[0])
        self.preprocessing = Preprocessing.choose(first.shape, torch.uint8, input_form, self.where)

    def fingerprint(self) -> str:
        """Return a hash of all paths, sizes and times of change."""
        digest = hashlib.sha256()
        for path in self._paths:
            status = path.stat()
            digest.update(f"{path.relative_to(self.where)} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _raw(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        expected = self.preprocessing.raw_shape
        x = torch.empty(len(numbers), *expected, dtype=torch.uint8)
        for row, number in enumerate(numbers):
            path = self._paths[number]
            image = _decode(path)
            if image.shape != expected:
                raise DataError(
                    f"{path} is {image.shape[1]} x {image.shape[0]} pixels, {self._paths[0]} is {expected[1]} x {expected[0]}"
                    "; give all images one size"
                )
            x[row] = torch.from_numpy(image)
        return x, self._labels.index_select(0, torch.from_numpy(numbers))

    def _name(self, number: np.int64) -> str:
        return str(self._paths[number])


def _decode(path: Path) -> npt.NDArray[np.uint8]:
    """Read an image as (height, width, 3)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    # PIL raises SyntaxError for some broken PNGs, and an error of its own for images that it takes for an attack.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); repair or remove it") from error

"""Answers of a model, and how each kind of file holds them: arrays, a row of a table, or a mask for each sample.

Answers are written as they come; of those that were not asked for as arrays none are kept in memory.
"""

import csv
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.inference.open_parts import SamplesToPredict
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.targets import TargetKind

BESIDE_OUTPUTS = ("targets", "classes", "files", "samples")
"""Arrays that may stand beside the outputs of a model."""


@dataclass(frozen=True)
class Answers:
    """What a model answers, in general: the form of its outputs, and what they mean.

    Args:
        kind: Kind of the run's targets.
        outputs: Output tensors by name, without the batch axis: one called `scores` where they are logits of classes or labels, else
            `outputs`, or the names that the model gives them.
        classes: Names of the classes, or of the labels or values; empty where nobody has named them.
        samples: The samples.
    """

    kind: TargetKind
    outputs: Mapping[str, TensorSpec]
    classes: Sequence[str]
    samples: SamplesToPredict

    @property
    def names(self) -> list[str]:
        """Names of the columns that a row of values or labels has."""
        spec = next(iter(self.outputs.values()))
        count = spec.shape[0] if spec.shape else 1
        if len(self.classes) == count:
            return list(self.classes)
        word = "label" if self.kind == "labels" else "value"
        return [word] if count == 1 else [f"{word}_{number}" for number in range(count)]

    def class_names(self, numbers: Iterable[int]) -> list[str]:
        """Return names of classes, or their numbers where they have no names.

        Args:
            numbers: Numbers of the classes.
        """
        return [self.classes[number] if 0 <= number < len(self.classes) else str(number) for number in numbers]


class AnswerWriter(Protocol):
    """Takes answers in the order of the samples."""

    def add(self, outputs: Mapping[str, Tensor], targets: Tensor) -> None:
        """Take the answers to some samples, or to some of their tokens.

        Args:
            outputs: Output tensors by name, on the host.
            targets: Targets of the samples; zeros where they have none.
        """
        ...

    def finish(self) -> None:
        """Write what comes last, and close all files."""
        ...

    def close(self) -> None:
        """Close all files, wherever writing ended."""
        ...


class ArrayWriter:
    """Writes each array to a `.npy` file of its own, front to back.

    Args:
        folder: Folder of the files.
        answers: What is written.
    """

    def __init__(self, folder: Path, answers: Answers) -> None:
        self._answers, self._folder, self._targets = answers, folder, answers.samples.targets
        self._files: dict[str, BinaryIO] = {}
        self._types: dict[str, np.dtype[Any]] = {}
        count = len(answers.samples)
        for name, spec in answers.outputs.items():
            self._begin(name, (count, *spec.shape), _numpy_type(spec.dtype))
        if answers.samples.labelled:
            self._begin("targets", (count, *self._targets.shape), _numpy_type(self._targets.dtype))

    def _begin(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._files[name], self._types[name] = (self._folder / f"{name}.npy").open("wb"), dtype
        np.lib.format.write_array_header_2_0(
            self._files[name], {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        )

    def add(self, outputs: Mapping[str, Tensor], targets: Tensor) -> None:
        """See `AnswerWriter.add`."""
        for name, tensor in outputs.items():
            self._write(name, tensor)
        if "targets" in self._files:
            self._write("targets", targets)

    def _write(self, name: str, tensor: Tensor) -> None:
        floating = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
        self._files[name].write(np.ascontiguousarray(floating.numpy(), dtype=self._types[name]).data)

    def finish(self) -> None:
        """See `AnswerWriter.finish`."""
        self.close()
        answers = self._answers
        if answers.classes and answers.kind != "own":
            np.save(self._folder / "classes.npy", np.array(list(answers.classes)))
        if (files := answers.samples.files(np.arange(len(answers.samples)))) is not None:
            np.save(self._folder / "files.npy", np.array(files))
        elif answers.samples.skipped:
            np.save(self._folder / "samples.npy", answers.samples.places)

    def close(self) -> None:
        """See `AnswerWriter.close`."""
        for file in self._files.values():
            file.close()


def pack_arrays(folder: Path, file: Path) -> None:
    """Put `.npy` files into a `.npz`, a piece at a time, and delete each.

    Args:
        folder: Folder of the files.
        file: Path of the new file.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path in sorted(folder.glob("*.npy")):
            archive.write(path, path.name)
            path.unlink()


def read_arrays(folder: Path) -> dict[str, npt.NDArray[Any]]:
    """Read `.npy` files, by name.

    Args:
        folder: Folder of the files.
    """
    return {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}


class TableWriter:
    """Writes a row for each sample to a CSV file.

    Args:
        file: Path of the new file.
        answers: What is written.

    Raises:
        ConfigError: An answer is no row of a table.
    """

    def __init__(self, file: Path, answers: Answers) -> None:
        specs = list(answers.outputs.values())
        if answers.kind in ("mask", "tokens") or len(specs) > 1 or len(specs[0].shape) > 1:
            what = {"mask": "a mask for each sample: give a folder, --out DIR/, or", "tokens": "scores for each token: give"}.get(
                answers.kind, "more than a row of numbers for each sample: give"
            )
            raise ConfigError(f"--out {file.suffix} is a table, and the model gives {what} --out FILE.npz")
        self._answers, self._begin = answers, 0
        self._stream = file.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._stream)
        is_class = answers.kind in ("class", "probabilities")
        columns = ["class", "probability"] if is_class else answers.names
        self._has_targets = answers.samples.labelled and answers.kind in ("class", "labels", "values")
        targets = [] if not self._has_targets else ["target"] if is_class else [f"target {name}" for name in answers.names]
        self._places = answers.samples.places
        first = "file" if answers.samples.files(np.arange(1)) is not None else "sample"
        self._writer.writerow([first, *columns, *targets])

    def add(self, outputs: Mapping[str, Tensor], targets: Tensor) -> None:
        """See `AnswerWriter.add`."""
        (values,) = (tensor.float() if tensor.dtype.is_floating_point else tensor for tensor in outputs.values())
        numbers = np.arange(self._begin, self._begin + len(values))
        self._begin += len(values)
        firsts: Sequence[Any] = self._answers.samples.files(numbers) or self._places[numbers].tolist()
        kind = self._answers.kind
        if kind in ("class", "probabilities"):
            best = values.softmax(-1).max(-1)
            rows: list[Sequence[str]] = list(
                zip(self._answers.class_names(best.indices.tolist()), _texts(best.values), strict=True)
            )
        else:
            values = values.sigmoid() if kind == "labels" else values
            rows = [tuple(_texts(row)) for row in values.reshape(len(values), -1)]
        rights: list[Sequence[Any]] = [()] * len(values)
        if self._has_targets and kind == "class":
            rights = [(name,) for name in self._answers.class_names(targets.tolist())]
        elif self._has_targets:
            rights = [tuple(_texts(row)) for row in targets.reshape(len(values), -1)]
        self._writer.writerows([first, *row, *right] for first, row, right in zip(firsts, rows, rights, strict=True))

    def finish(self) -> None:
        """See `AnswerWriter.finish`."""
        self.close()

    def close(self) -> None:
        """See `AnswerWriter.close`."""
        self._stream.close()


class MaskWriter:
    """Writes a PNG for each sample, with a class number for each pixel as its grey value, called as the image is.

    Args:
        folder: Folder of the files.
        answers: What is written.

    Raises:
        ConfigError: The model gives no masks.
    """

    def __init__(self, folder: Path, answers: Answers) -> None:
        if answers.kind != "mask":
            raise ConfigError(
                "--out DIR/ takes masks, and the model gives no class for each pixel; give --out FILE.csv or --out FILE.npz"
            )
        self._folder, self._begin = folder, 0
        self._names = _mask_names(answers.samples)

    def add(self, outputs: Mapping[str, Tensor], targets: Tensor) -> None:
        """See `AnswerWriter.add`."""
        from PIL import Image

        (scores,) = outputs.values()
        small = scores.shape[1] <= 256
        for mask in scores.argmax(1).to(torch.uint8 if small else torch.int32):
            array = mask.numpy() if small else mask.numpy().astype(np.uint16)
            path = self._folder / self._names(self._begin)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
            self._begin += 1

    def finish(self) -> None:
        """See `AnswerWriter.finish`."""

    def close(self) -> None:
        """See `AnswerWriter.close`."""


def _mask_names(samples: SamplesToPredict) -> Any:
    """Return what gives the name of a sample's mask: that of its image, or its number."""
    files = samples.files(np.arange(len(samples)))
    if files is None:
        places = samples.places
        return lambda number: f"{places[number]:0{max(6, len(str(places[-1])))}d}.png"
    # What lies outside of the data's folder is called by its own name alone.
    inside = [Path(*(part for part in Path(file).parts if part != "images")) for file in files]
    inside = [Path(path.name) if path.is_absolute() else path for path in inside]
    stems = {path.with_suffix("") for path in inside}
    # Of a.jpg and a.png neither replaces the other.
    whole = len(stems) < len(inside)
    names = [Path(f"{path}.png") if whole else path.with_suffix(".png") for path in inside]
    if len(set(names)) < len(names):
        names = [Path(f"{number:06d}-{name.name}") for number, name in enumerate(names)]
    return names.__getitem__


def _numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the type that values are written as: numpy has no bfloat16."""
    return np.dtype(np.float32) if dtype in (torch.bfloat16, torch.float16) else torch.empty(0, dtype=dtype).numpy().dtype


def _texts(values: Tensor) -> list[str]:
    """Return numbers as the shortest texts that are read as the same float32."""
    return [str(value) for value in values.numpy()]

"""Preprocessing of samples: scale, axes and dtype that a model takes, with each step in words for whoever uses the model later."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.resize import Resize

InputForm = Literal["flat", "image3", "any"]
"""Form of the samples that a model takes: flattened, images of three channels, or samples as they are."""
Layout = Literal["HW", "HWC", "CHW"]
"""Axes of an image: height, width, and channels last, first, or none."""


@dataclass(frozen=True)
class Preprocessing:
    """Steps from a raw sample to a model's input, the same for every sample of a data set.

    Args:
        raw_shape: Shape of a sample as it is stored, or as it was resized.
        raw_dtype: Element type of a sample as it is stored.
        shape: Shape of a sample as the model takes it.
        dtype: Element type of a sample as the model takes it: float32, or int64 for tokens.
        steps: Steps in words.
    """

    raw_shape: tuple[int, ...]
    raw_dtype: torch.dtype
    shape: tuple[int, ...]
    dtype: torch.dtype
    steps: tuple[str, ...]
    _layout: Layout | None
    _grey_to_three: bool
    _resize: Resize | None = None

    @classmethod
    def choose(
        cls,
        raw_shape: tuple[int, ...],
        raw_dtype: torch.dtype,
        input_form: InputForm,
        where: str,
        layout: Layout | None = None,
        resize: Resize | None = None,
    ) -> "Preprocessing":
        """Choose the preprocessing of samples for a model.

        uint8 is divided by 255 and taken as an image where it has two or three axes: HWC becomes CHW, HW becomes 1HW. Other
        numbers keep their values and axes: floats become float32, integers int64 (tokens) for a model that takes samples as they
        are, else float32. For a model that takes three channels, the channel of grey images is repeated.

        Args:
            raw_shape: Shape of a sample as it is stored.
            raw_dtype: Element type of a sample as it is stored.
            input_form: Form of the samples that the model takes.
            where: Name of the data set, for messages.
            layout: Axes of the samples, where they are known to be images; None to find them by their sizes.
            resize: Brings images to one size; None to leave them as they are.

        Raises:
            DataError: The samples are no numbers, are empty, or are no images where the model takes images.

        Example:
            >>> Preprocessing.choose((28, 28), torch.uint8, "image3", "digits").steps
            ('uint8 / 255', 'HW to CHW', 'grey repeated to 3 channels')
        """
        if raw_dtype.is_complex:
            raise DataError(f"data set {where}: samples are {_dtype_name(raw_dtype)}; give real numbers")
        if 0 in raw_shape:
            raise DataError(
                f"data set {where}: samples of shape {raw_shape} hold no values; give samples with at least one value"
            )
        if layout is None and (raw_dtype == torch.uint8 or input_form == "image3" or resize is not None):
            layout = _layout_of(raw_shape, prefer_last=raw_dtype == torch.uint8)
        if resize is not None:
            if layout is None:
                raise DataError(
                    f"data set {where}: samples have shape {raw_shape}, and --image-size is for images (height, width), (height, width, 3) "
                    "or (channels, height, width); leave it out"
                )
            raw_shape = resize_shape(raw_shape, layout, resize, where)
        shape = {"HW": (1, *raw_shape), "HWC": (*raw_shape[-1:], *raw_shape[:-1])}.get(layout or "", raw_shape)
        if input_form == "image3" and (len(shape) != 3 or shape[0] not in (1, 3)):
            raise DataError(
                f"data set {where}: samples have shape {raw_shape}, but the model takes images of three channels; give images "
                "(height, width), (height, width, 3) or (3, height, width), or another model"
            )
        dtype = torch.int64 if holds_tokens(raw_dtype, input_form) else torch.float32
        steps = ["uint8 / 255" if raw_dtype == torch.uint8 else _cast_step(raw_dtype, dtype)]
        if layout in ("HW", "HWC"):
            steps.append(f"{layout} to CHW")
        grey_to_three = input_form == "image3" and shape[0] == 1
        if grey_to_three:
            steps.append("grey repeated to 3 channels")
            shape = (3, *shape[1:])
        if input_form == "flat" and len(shape) != 1:
            steps.append("flattened")
            shape = (int(torch.Size(shape).numel()),)
        return cls(raw_shape, raw_dtype, shape, dtype, tuple(steps), layout, grey_to_three, resize)

    @property
    def all_steps(self) -> tuple[str, ...]:
        """All steps in words, with resizing where it happens: bytes are resized as bytes."""
        return self.steps_after(self.steps[:1])

    def steps_after(self, first: tuple[str, ...]) -> tuple[str, ...]:
        """Return all steps in words, with others in the place of the first one.

        Args:
            first: Steps that lead to values from 0 to 1, or to numbers as they are; the last one is the scale.
        """
        resizing = () if self._resize is None else self._resize.steps
        before = resizing if self.raw_dtype == torch.uint8 else ()
        return (*first[:-1], *before, first[-1], *(() if before else resizing), *self.steps[1:])

    def resized(self, raw: Tensor) -> Tensor:
        """Bring raw samples to the size that all have, where images are to be resized.

        Args:
            raw: Raw samples (B, ...) of one size, whatever it is.
        """
        if self._resize is None or raw.ndim != len(self.raw_shape) + 1:
            return raw
        if self._layout == "HWC":
            return self._resize(raw.movedim(-1, 1)).movedim(1, -1)
        return self._resize(raw.unsqueeze(1)).squeeze(1) if self._layout == "HW" else self._resize(raw)

    def as_floats(self) -> "Preprocessing":
        """Return the same steps, but for integers that become float32: numbers to calculate with, and no tokens."""
        steps = (_cast_step(self.raw_dtype, torch.float32), *self.steps[1:])
        return dataclasses.replace(self, dtype=torch.float32, steps=steps)

    def __call__(self, raw: Tensor) -> Tensor:
        """Preprocess a batch.

        Args:
            raw: Raw samples (B, *raw_shape), the caller's own; they may be returned as they are.

        Returns:
            Model inputs (B, *shape), contiguous.
        """
        x = raw
        if self._layout == "HWC":
            x = x.movedim(-1, 1)
        elif self._layout == "HW":
            x = x.unsqueeze(1)
        x = x.to(self.dtype)
        if self.raw_dtype == torch.uint8:
            x = x.div_(255)
        if self._grey_to_three:
            x = x.expand(-1, 3, -1, -1)
        return x.reshape(len(x), *self.shape).contiguous()


def resize_shape(shape: tuple[int, ...], layout: Layout, resize: Resize, where: str) -> tuple[int, ...]:
    """Return the shape that a resized image has, its axes in their order.

    Args:
        shape: Shape of the image.
        layout: Its axes.
        resize: Resizes it.
        where: Name of the data set, for messages.

    Raises:
        DataError: It is too long and thin.
    """
    sides = shape[1:] if layout == "CHW" else shape[:2]
    if (fault := resize.fault(*sides)) is not None:
        raise DataError(f"data set {where}: a sample {fault}")
    size = (resize.height, resize.width)
    return (*shape[:1], *size) if layout == "CHW" else (*size, *shape[2:])


def holds_tokens(raw_dtype: torch.dtype, input_form: InputForm) -> bool:
    """Decide whether samples are token numbers: integers other than uint8, for a model that takes samples as they are.

    Args:
        raw_dtype: Element type of a sample as it is stored.
        input_form: Form of the samples that the model takes.
    """
    is_integer = not (raw_dtype.is_floating_point or raw_dtype.is_complex or raw_dtype in (torch.uint8, torch.bool))
    return is_integer and input_form == "any"


def _layout_of(shape: tuple[int, ...], prefer_last: bool) -> Layout | None:
    """Find the channel axis by its size, 1 or 3 (the last axis: 4 too); where first and last axis fit, `prefer_last` decides."""
    if len(shape) == 2:
        return "HW"
    if len(shape) != 3:
        return None
    first, last = shape[0] in (1, 3), shape[-1] in (1, 3)
    if first and last:
        return "HWC" if prefer_last else "CHW"
    return "CHW" if first else "HWC" if last or shape[-1] == 4 else "CHW"


def _cast_step(raw: torch.dtype, dtype: torch.dtype) -> str:
    return f"{_dtype_name(raw)} as it is" if raw == dtype else f"{_dtype_name(raw)} to {_dtype_name(dtype)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

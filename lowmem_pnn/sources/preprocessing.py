"""How samples are presented to a model: layout of axes, scale and dtype, said in words for whoever scores the model later."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowmem_pnn.errors import DataError

Wants = Literal["flat", "image3", "any"]
_Layout = Literal["HW", "HWC", "CHW"]


@dataclass(frozen=True)
class Presentation:
    """One way to turn raw samples into what the model sees, the same for every sample of a data set.

    Args:
        raw_shape: of a sample as it is stored.
        raw_dtype: of a sample as it is stored.
        shape: of a sample as the model sees it.
        dtype: float32, or int64 for tokens.
        words: what is done, one step each.
    """

    raw_shape: tuple[int, ...]
    raw_dtype: torch.dtype
    shape: tuple[int, ...]
    dtype: torch.dtype
    words: tuple[str, ...]
    _layout: _Layout | None
    _grey_to_three: bool

    @classmethod
    def of(cls, raw_shape: tuple[int, ...], raw_dtype: torch.dtype, wants: Wants, where: str) -> "Presentation":
        """Choose how to present samples.

        uint8 is divided by 255 and taken as an image where it has two or three axes: HWC becomes CHW, HW becomes 1HW. Other
        numbers keep their values and axes: floats become float32, integers int64 (tokens) for a model that takes samples as they
        are, else float32. A model that wants three channels gets three from grey images of any dtype.

        Args:
            raw_shape: of a sample as it is stored.
            raw_dtype: of a sample as it is stored.
            wants: what the model takes.
            where: the data set's name, for messages.

        Raises:
            DataError: the samples are no numbers, are empty, or are no images where the model wants images.

        Example:
            >>> Presentation.of((28, 28), torch.uint8, "image3", "digits").words
            ('uint8 / 255', 'HW to CHW', 'grey repeated to 3 channels')
        """
        if raw_dtype.is_complex:
            raise DataError(f"data set {where}: samples are {_dtype_name(raw_dtype)}; give real numbers")
        if 0 in raw_shape:
            raise DataError(
                f"data set {where}: samples of shape {raw_shape} hold no values; give samples with at least one value"
            )
        is_image = raw_dtype == torch.uint8 or wants == "image3"
        layout = _layout_of(raw_shape, prefer_last=raw_dtype == torch.uint8) if is_image else None
        shape = {"HW": (1, *raw_shape), "HWC": (*raw_shape[-1:], *raw_shape[:-1])}.get(layout or "", raw_shape)
        if wants == "image3" and (len(shape) != 3 or shape[0] not in (1, 3)):
            raise DataError(
                f"data set {where}: samples have shape {raw_shape}, but the model takes images of three channels; give images "
                "(height, width), (height, width, 3) or (3, height, width), or another model"
            )
        dtype = torch.int64 if holds_tokens(raw_dtype, wants) else torch.float32
        words = ["uint8 / 255" if raw_dtype == torch.uint8 else _cast_words(raw_dtype, dtype)]
        if layout in ("HW", "HWC"):
            words.append(f"{layout} to CHW")
        grey_to_three = wants == "image3" and shape[0] == 1
        if grey_to_three:
            words.append("grey repeated to 3 channels")
            shape = (3, *shape[1:])
        if wants == "flat" and len(shape) != 1:
            words.append("flattened")
            shape = (int(torch.Size(shape).numel()),)
        return cls(raw_shape, raw_dtype, shape, dtype, tuple(words), layout, grey_to_three)

    def __call__(self, raw: Tensor) -> Tensor:
        """Present a batch.

        Args:
            raw: (B, *raw_shape) of the raw dtype; the caller's own, it may be returned as it is.

        Returns:
            (B, *shape), contiguous.
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


def holds_tokens(raw_dtype: torch.dtype, wants: Wants) -> bool:
    """Whether samples are token numbers: integers other than uint8, for a model that takes samples as they are.

    Args:
        raw_dtype: of a sample as it is stored.
        wants: what the model takes.
    """
    is_integer = not (raw_dtype.is_floating_point or raw_dtype.is_complex or raw_dtype in (torch.uint8, torch.bool))
    return is_integer and wants == "any"


def _layout_of(shape: tuple[int, ...], prefer_last: bool) -> _Layout | None:
    """Find the channel axis: the one of 1 or 3 (last: 4 also); where both ends could be, the last for uint8 as files have it."""
    if len(shape) == 2:
        return "HW"
    if len(shape) != 3:
        return None
    first, last = shape[0] in (1, 3), shape[-1] in (1, 3)
    if first and last:
        return "HWC" if prefer_last else "CHW"
    return "CHW" if first else "HWC" if last or shape[-1] == 4 else "CHW"


def _cast_words(raw: torch.dtype, dtype: torch.dtype) -> str:
    return f"{_dtype_name(raw)} as it is" if raw == dtype else f"{_dtype_name(raw)} to {_dtype_name(dtype)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

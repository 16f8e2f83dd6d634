"""Encoding of boundary tensors on disk: as they are, in a shorter floating type, or as int8 with a scale for each group of values.

Encoded as int8, a value x is a number q from -128 to 127, and its group has a scale s (float32):

    s > 0:  x = q * s             s = max |x| / 127
    s < 0:  x = (q + 128) * -s    -s = max x / 255; no value of the group is below 0, as after a ReLU

So the zero point, 0 or -128, takes no bytes of its own. A zero comes back as zero, any other value within |s| / 2. A group is all
values at one index of axis 1 of one sample: a channel of (B, C, H, W), a token of (B, T, D); or the whole sample where such groups
would have fewer than 16 values, or there is no axis 1. A group with a value that is not finite comes back as NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.disk import CHUNK_BYTES
from lowmem_pnn.stores.header import TensorLayout

Encoding = Literal["float32", "bfloat16", "float16", "int8"]
"""Type in which floating tensors are stored, where that is smaller than their own; `float32` stores every tensor as it is."""
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

WORK_BYTES = 2 * CHUNK_BYTES
"""Bytes that `encode` of contiguous tensors takes in memory beside its arguments; `decode` takes none."""

_SMALLEST_GROUP = 16
_SYMMETRIC, _ONE_SIDED = 127, 255
_ZERO_POINT = 128


class OverflowFault(ValueError):
    """Finite value that would become infinite; the caller, who knows where it comes from, turns this into an error for the user."""

    def __init__(self, value: float, limit: float) -> None:
        super().__init__(f"{value:g} is beyond {limit:g}")
        self.value = value
        self.limit = limit


def encoded_layout(spec: TensorSpec, encoding: Encoding) -> tuple[TensorLayout, ...]:
    """Return element type and shape of the tensors in which one sample of a tensor is stored.

    Args:
        spec: Shape and element type of the sample.
        encoding: Encoding that was asked for.

    Returns:
        Layout of the values, then, for int8, of the scales (groups,).

    Example:
        >>> encoded_layout(TensorSpec((8, 5, 5), torch.float32), "int8")
        ((torch.int8, (8, 5, 5)), (torch.float32, (8,)))
        >>> encoded_layout(TensorSpec((8,), torch.int64), "int8")
        ((torch.int64, (8,)),)
    """
    shape, dtype = spec.shape, spec.dtype
    target: torch.dtype = getattr(torch, encoding)
    if encoding == "float32" or not dtype.is_floating_point or target.itemsize >= dtype.itemsize:
        return ((dtype, shape),)
    if encoding != "int8":
        return ((target, shape),)
    size = math.prod(shape)
    groups = shape[0] if len(shape) > 1 and size >= _SMALLEST_GROUP * shape[0] > 0 else 1
    layout = (torch.int8, shape), (torch.float32, (groups,))
    return layout if size + torch.float32.itemsize * groups < spec.sample_bytes else ((dtype, shape),)


def encoded_bytes(spec: TensorSpec, encoding: Encoding) -> int:
    """Return the bytes in which one sample of a tensor is stored.

    Example:
        >>> [encoded_bytes(TensorSpec((8, 5, 5), torch.float32), encoding) for encoding in ENCODINGS]
        [800, 400, 400, 232]
    """
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in encoded_layout(spec, encoding))


def encode(tensor: Tensor, encoded: Sequence[Tensor]) -> None:
    """Fill the tensors in which a tensor is stored.

    Args:
        tensor: Samples (B, ...), on any device.
        encoded: Tensors to fill, of the layout that `encoded_layout` says, each (B, ...), contiguous, on the CPU.

    Raises:
        OverflowFault: A finite value is too large for the encoding.
    """
    values, *scales = encoded
    tensor = tensor.detach()
    if not values.numel():
        return
    if scales:
        _quantize(tensor, values, scales[0])
    else:
        values.copy_(tensor)
        if values.dtype != tensor.dtype:
            _check_overflow(tensor, values)


def decode(encoded: Sequence[Tensor], tensor: Tensor) -> None:
    """Fill a tensor from the tensors in which it is stored.

    Args:
        encoded: Tensors as `encode` leaves them.
        tensor: Tensor to fill, (B, ...), contiguous, on the CPU, of its own type.
    """
    values, *scales = encoded
    tensor.copy_(values)
    if scales and values.numel():
        rows, factor = tensor.view(scales[0].numel(), -1), scales[0].view(-1, 1)
        one_sided = factor < 0
        if one_sided.any():
            rows.add_(one_sided, alpha=_ZERO_POINT)
        rows.mul_(factor.abs())


def _quantize(tensor: Tensor, values: Tensor, scales: Tensor) -> None:
    size = values.numel() // scales.numel()
    samples_at_once = max(1, CHUNK_BYTES // (4 * values[0].numel()))
    rows_at_once = max(1, CHUNK_BYTES // (4 * size))
    row = 0
    # By samples, since a tensor of other strides is copied here; and inside a sample that is large, by groups.
    for samples in tensor.split(samples_at_once):
        for part in samples.reshape(-1, size).split(rows_at_once):
            stop = row + len(part)
            _quantize_rows(part, values.view(-1, size)[row:stop], scales.view(-1)[row:stop])
            row = stop


def _quantize_rows(rows: Tensor, values: Tensor, scales: Tensor) -> None:
    """Quantize groups (G, N) into int8 (G, N) and scales (G,)."""
    original, rows = rows, rows.to(scales.device, torch.float32)
    if original.dtype.itemsize > rows.dtype.itemsize:
        _check_overflow(original, rows)
    low, high = rows.amin(1), rows.amax(1)
    one_sided = low >= 0
    scale = torch.where(one_sided, high / _ONE_SIDED, torch.maximum(-low, high) / _SYMMETRIC)
    # Below this smallest scale floats have fewer digits, and a quotient could be anything; a group of zeros gets this scale too.
    scale.clamp_(min=torch.finfo(torch.float32).tiny)
    quotient = rows / scale[:, None]
    quotient.round_()
    if one_sided.any():
        quotient.add_(one_sided[:, None], alpha=-_ZERO_POINT)
    finite = scale.isfinite()
    if not finite.all():
        quotient[~finite] = 0  # what an integer makes of NaN differs between processors
    values.copy_(quotient)
    torch.where(one_sided, -scale, scale, out=scales)
    scales[~finite] = math.nan


def _check_overflow(tensor: Tensor, narrow: Tensor) -> None:
    """Raise if a finite value became infinite in the conversion to a narrower type."""
    low, high = torch.aminmax(tensor)
    ends = torch.stack((low, high))
    if ends.to(narrow.dtype).isfinite().all():
        return
    # Where the tensor itself holds NaN or an infinity, its ends say nothing of the other values.
    lost = tensor[narrow.to(tensor.device).isinf() & tensor.isfinite()]
    if len(lost):
        raise OverflowFault(float(lost[0]), torch.finfo(narrow.dtype).max)

"""How a tensor of a boundary is kept on disk: as it is, in a shorter floating type, or as int8 with a scale for each group of values.

Kept as int8, a value x is a number q from -128 to 127, and its group has a scale s (float32):

    s > 0:  x = q * s             s = max |x| / 127
    s < 0:  x = (q + 128) * -s    -s = max x / 255; no value of the group is below 0, as after a ReLU

So the zero point, 0 or -128, takes no bytes of its own. A zero comes back as zero, any other value within |s| / 2. A group is what has
one place on axis 1 of one sample: a channel of (B, C, H, W), a token of (B, T, D); or the whole sample where these would have fewer
than 16 values, or there is no such axis. A group with a value that is not finite comes back as NaN.
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

KeptAs = Literal["float32", "bfloat16", "float16", "int8"]
"""What floating tensors are kept as, where that is smaller than they are; `float32` keeps every tensor as it is."""
KINDS: tuple[KeptAs, ...] = get_args(KeptAs)

WORK_BYTES = 2 * CHUNK_BYTES
"""What `encode` of contiguous tensors takes in memory beside its arguments; `decode` takes nothing."""

_SMALLEST_GROUP = 16
_SYMMETRIC, _ONE_SIDED = 127, 255
_ZERO_POINT = 128


class OverflowFault(ValueError):
    """A finite value that would become infinite; who knows where it comes from turns this into an error for the user."""

    def __init__(self, value: float, limit: float) -> None:
        super().__init__(f"{value:g} is beyond {limit:g}")
        self.value = value
        self.limit = limit


def kept_layout(spec: TensorSpec, kept_as: KeptAs) -> tuple[TensorLayout, ...]:
    """What one sample of a tensor is kept in.

    Args:
        spec: of the tensor.
        kept_as: what was asked for.

    Returns:
        Element type and shape of the values, then, of int8, of the scales (groups,).

    Example:
        >>> kept_layout(TensorSpec((8, 5, 5), torch.float32), "int8")
        ((torch.int8, (8, 5, 5)), (torch.float32, (8,)))
        >>> kept_layout(TensorSpec((8,), torch.int64), "int8")
        ((torch.int64, (8,)),)
    """
    shape, dtype = spec.shape, spec.dtype
    target: torch.dtype = getattr(torch, kept_as)
    if kept_as == "float32" or not dtype.is_floating_point or target.itemsize >= dtype.itemsize:
        return ((dtype, shape),)
    if kept_as != "int8":
        return ((target, shape),)
    size = math.prod(shape)
    groups = shape[0] if len(shape) > 1 and size >= _SMALLEST_GROUP * shape[0] > 0 else 1
    layout = (torch.int8, shape), (torch.float32, (groups,))
    return layout if size + torch.float32.itemsize * groups < spec.sample_bytes else ((dtype, shape),)


def kept_bytes(spec: TensorSpec, kept_as: KeptAs) -> int:
    """Bytes that one sample of a tensor is kept in.

    Example:
        >>> [kept_bytes(TensorSpec((8, 5, 5), torch.float32), kind) for kind in KINDS]
        [800, 400, 400, 232]
    """
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in kept_layout(spec, kept_as))


def encode(tensor: Tensor, kept: Sequence[Tensor]) -> None:
    """Fill what a tensor is kept in.

    Args:
        tensor: (B, ...), on any device.
        kept: as `kept_layout` says, each (B, ...), contiguous, on the CPU.

    Raises:
        OverflowFault: a finite value has no finite one that it could be kept as.
    """
    values, *scales = kept
    tensor = tensor.detach()
    if not values.numel():
        return
    if scales:
        _quantise(tensor, values, scales[0])
    else:
        values.copy_(tensor)
        if values.dtype != tensor.dtype:
            _check_overflow(tensor, values)


def decode(kept: Sequence[Tensor], tensor: Tensor) -> None:
    """Fill a tensor from what it is kept in.

    Args:
        kept: as `encode` leaves it.
        tensor: (B, ...), contiguous, on the CPU, of its own type.
    """
    values, *scales = kept
    tensor.copy_(values)
    if scales and values.numel():
        rows, factor = tensor.view(scales[0].numel(), -1), scales[0].view(-1, 1)
        one_sided = factor < 0
        if one_sided.any():
            rows.add_(one_sided, alpha=_ZERO_POINT)
        rows.mul_(factor.abs())


def _quantise(tensor: Tensor, values: Tensor, scales: Tensor) -> None:
    size = values.numel() // scales.numel()
    samples_at_once = max(1, CHUNK_BYTES // (4 * values[0].numel()))
    rows_at_once = max(1, CHUNK_BYTES // (4 * size))
    row = 0
    # By samples, since a tensor of other strides is copied here; and inside a sample that is large, by groups.
    for samples in tensor.split(samples_at_once):
        for part in samples.reshape(-1, size).split(rows_at_once):
            stop = row + len(part)
            _quantise_rows(part, values.view(-1, size)[row:stop], scales.view(-1)[row:stop])
            row = stop


def _quantise_rows(rows: Tensor, values: Tensor, scales: Tensor) -> None:
    """Groups (G, N) into int8 (G, N) and scales (G,)."""
    given, rows = rows, rows.to(scales.device, torch.float32)
    if given.dtype.itemsize > rows.dtype.itemsize:
        _check_overflow(given, rows)
    low, high = rows.amin(1), rows.amax(1)
    one_sided = low >= 0
    scale = torch.where(one_sided, high / _ONE_SIDED, torch.maximum(-low, high) / _SYMMETRIC)
    # Below it floats have fewer digits, and a quotient could be anything; a group of zeros gets it too.
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

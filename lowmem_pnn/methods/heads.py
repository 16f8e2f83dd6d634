"""Auxiliary heads: small networks that give a layer class scores of its own, for its local loss and as an early exit.

    maps    (C, H, W)   [mean to at most 8x8] - 3x3 convolution to F filters - BatchNorm - ReLU - mean to 2x2 - linear; (C, L) likewise, and
                        (H, W, C) turned to channels first, where the layer's last module with weights says so
    vectors (D,)        linear to D between 16 and 256 (`classic`: to 256; `linear`: without it) - ReLU - linear
    tokens  (T, D)      LayerNorm - [mean over tokens, where a sample has one label] - linear

| kind | heads of maps, with F filters |
| --- | --- |
| `adaptive` | F = min(1024 / side, C / 2), between 16 and 256: fewer filters where the map is large; on a map of at most 8x8 |
| `classic` | F = 256 everywhere, on the whole map: the heads of earlier local learning |
| `auglocal` | convolutions with the shapes of d later boundaries, evenly spaced; d from 3 down to 1 (AugLocal, Ma et al. 2024) |
| `linear` | mean over positions, and a linear layer |

NeuroFlux (arXiv 2402.14139) says that the number of filters varies with the layer, not how. The rule of `adaptive` is ours: the memory
of a head's map grows with the side instead of its square, a head has no more channels than its layer, and at 512 channels of 4x4 the
head equals the classic one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lowmem_pnn.model.chain import TensorSpec

HeadKind = Literal["adaptive", "classic", "auglocal", "linear"]

_CLASSIC_FILTERS, _MIN_FILTERS = 256, 16
_MAX_SIDE = 8
_POOLED_SIDE = 2
_MAX_COPIES = 3


def num_filters(kind: HeadKind, channels: int, side: float) -> int:
    """Return the number of filters in a head's convolution.

    Args:
        kind: Kind of head; `linear` has no filters.
        channels: Channels of the map.
        side: Side of the map in positions: the square root of its area.

    Example:
        >>> [num_filters("adaptive", *map) for map in ((64, 32), (128, 16), (512, 4), (64, 4))], num_filters("classic", 64, 32)
        ([32, 64, 256, 32], 256)
    """
    if kind == "linear":
        return 0
    if kind == "classic":
        return _CLASSIC_FILTERS
    return max(_MIN_FILTERS, min(_CLASSIC_FILTERS, int(4 * _CLASSIC_FILTERS / side), channels // 2))


def make_head(kind: HeadKind, boundary: TensorSpec, later: Sequence[TensorSpec], num_classes: int, tokens: bool) -> nn.Module:
    """Make a head for the outputs of a layer.

    Args:
        kind: Kind of head.
        boundary: Output tensor of the layer, with the axis of its features where that is known.
        later: Output tensors of the layers after it, without the model's class scores.
        num_classes: Number of classes in the data.
        tokens: Whether each token has a label of its own.

    Returns:
        A module from (B, *boundary.shape) to (B, classes), or (B, T, classes) for tokens, on the default device; the weights are drawn
        from PyTorch's generator.
    """
    shape = boundary.shape
    if (map_shape := boundary.map_shape) is not None and not (tokens and len(shape) == 2):
        maps = [spec.map_shape for spec in later if spec.map_shape is not None and len(spec.shape) == len(shape)]
        head = _map_head(kind, map_shape, maps, num_classes)
        return nn.Sequential(ChannelsFirst(), *head) if boundary.features == -1 else head
    if len(shape) == 2:
        head = _token_head(kind, shape[-1 if map_shape is None else 0], num_classes, tokens)
        return head if map_shape is None else nn.Sequential(ChannelsLast(), *head)
    width = {"linear": 0, "classic": _CLASSIC_FILTERS}.get(kind, min(_CLASSIC_FILTERS, max(_MIN_FILTERS, shape[0])))
    hidden = [nn.Linear(shape[0], width), nn.ReLU()] if width else []
    return nn.Sequential(*hidden, nn.Linear(width or shape[0], num_classes))


def _map_head(kind: HeadKind, shape: tuple[int, ...], later: Sequence[tuple[int, ...]], num_classes: int) -> nn.Sequential:
    channels, positions = shape[0], len(shape) - 1
    side = math.prod(shape[1:]) ** (1 / positions)
    convolution, norm, pool = AXES[positions]
    parts: list[nn.Module] = []
    if kind == "auglocal":
        copies = min(len(later), 1 + round((_MAX_COPIES - 1) * len(later) / (len(later) + 2)))
        # Evenly spaced boundaries, the last one included.
        for number in range(copies):
            copied = later[(number + 1) * len(later) // copies - 1]
            stride = max(1, round(side / math.prod(copied[1:]) ** (1 / positions)))
            parts += [convolution(channels, copied[0], 3, stride, 1, bias=False), norm(copied[0]), nn.ReLU()]
            channels, side = copied[0], side / stride
    if kind in ("adaptive", "classic") or (kind == "auglocal" and not later):
        filters = num_filters("classic" if kind == "classic" else "adaptive", channels, side)
        if kind != "classic":
            parts += pooled_map(shape)
        parts += [convolution(channels, filters, 3, 1, 1, bias=False), norm(filters), nn.ReLU()]
        channels = filters
    grid = 1 if kind == "linear" else _POOLED_SIDE
    return nn.Sequential(*parts, pool(grid), nn.Flatten(), nn.Linear(channels * grid**positions, num_classes))


def pooled_map(shape: tuple[int, ...]) -> list[nn.Module]:
    """Return what brings a map to 8x8 by means, where it has more positions than that; nothing where it has not.

    Args:
        shape: Channels, and sides of the map.
    """
    positions = len(shape) - 1
    return [AXES[positions][2](_MAX_SIDE)] if math.prod(shape[1:]) > _MAX_SIDE**positions else []


def _token_head(kind: HeadKind, width: int, num_classes: int, tokens: bool) -> nn.Sequential:
    hidden = [nn.Linear(width, _CLASSIC_FILTERS), nn.GELU()] if kind == "classic" else []
    pooled = [] if tokens else [MeanOverTokens()]
    return nn.Sequential(nn.LayerNorm(width), *pooled, *hidden, nn.Linear(_CLASSIC_FILTERS if hidden else width, num_classes))


class MeanOverTokens(nn.Module):
    """Mean over tokens: (B, T, D) to (B, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over tokens."""
        return torch.mean(x, 1)


class ChannelsFirst(nn.Module):
    """Maps with their channels first: (B, H, W, C) to (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps."""
        return x.movedim(-1, 1)


class ChannelsLast(nn.Module):
    """Maps with their channels last: (B, C, H, W) to (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps."""
        return x.movedim(1, -1)


AXES: dict[int, tuple[Callable[..., nn.Module], ...]] = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
    2: (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d),
    3: (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d),
}
"""Convolution, norm and pooling by the number of a map's spatial axes."""

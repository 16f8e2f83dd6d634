"""Thin parts: one cheap layer that goes from one boundary of a chain to another, in the place of all layers between them.

    maps    (C, H, W) to (C', H', W')   convolution with the stride of the maps - BatchNorm - ReLU [- mean to H' x W']; 3x3, or as wide as
                                        a stride above 2
            (C, H, W) to (D,)           3x3 convolution - BatchNorm - ReLU - mean to 2x2 - linear
            (C, L) likewise, and (H, W, C) turned to channels first and back, where the modules before a boundary say that it is one
    vectors (D,) to (D',)               linear - ReLU; without the ReLU where it gives the model's own outputs
    tokens  (T, D) to (T, D')           LayerNorm - linear
            (T, D) to (D',)             LayerNorm - mean over tokens - linear

A meta model is a chain of them, one for each partition (Deep Incubation, Ni et al., arXiv 2212.04129). Ours is built from the boundaries of
the chain alone, so that it fits any model that has such boundaries.
"""

import torch
from torch import Tensor, nn

from lowmem_pnn.methods.heads import AXES, ChannelsFirst, ChannelsLast, MeanOverTokens
from lowmem_pnn.model.chain import TensorSpec

_POOLED_SIDE = 2


class CopiedLayer(nn.Module):
    """A layer of a chain as a module of its own.

    Args:
        layer: module of the layer, which returns a tuple of one tensor.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's only output."""
        (output,) = self.layer(x)
        return output  # type: ignore[no-any-return]


class GivenAs(nn.Module):
    """Outputs in a type.

    Args:
        dtype: the type.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return the same numbers in that type."""
        return x.to(self._dtype)


def make_thin_part(before: TensorSpec, after: TensorSpec, *, is_last: bool) -> nn.Module | None:
    """Make a thin part, with weights drawn from PyTorch's generator.

    Args:
        before: Tensor at the first boundary, with the axis of its features where that is known.
        after: Tensor at the second boundary, likewise.
        is_last: Whether the part gives the model's own outputs, which no activation bounds.

    Returns:
        A module from (B, *before.shape) to (B, *after.shape), on the default device; None where none of the module's rules applies.
    """
    if not (before.dtype.is_floating_point and after.dtype.is_floating_point):
        return None
    source, target = before.shape, after.shape
    if len(source) - 1 in AXES and (before.map_shape, after.map_shape) != (None, None):
        first = [ChannelsFirst()] if before.map_shape is None or before.features == -1 else []
        # Between a map (C, L) and tokens (T, D) the tokens are positions.
        maps = before.map_shape or source[::-1]
        if len(target) == len(source):
            last = [ChannelsLast()] if after.map_shape is None or after.features == -1 else []
            return nn.Sequential(*first, *_between_maps(maps, after.map_shape or target[::-1], is_last=is_last), *last)
        if len(target) == 1:
            convolution, norm, pool = AXES[len(source) - 1]
            body = [convolution(maps[0], maps[0], 3, 1, 1, bias=False), norm(maps[0]), nn.ReLU()]
            linear = nn.Linear(maps[0] * _POOLED_SIDE ** (len(source) - 1), target[0])
            return nn.Sequential(*first, *body, pool(_POOLED_SIDE), nn.Flatten(), linear, *([] if is_last else [nn.ReLU()]))
    elif len(source) == 2 and target[:-1] in (source[:-1], ()):
        pooled = [] if len(target) == 2 else [MeanOverTokens()]
        return nn.Sequential(nn.LayerNorm(source[-1]), *pooled, nn.Linear(source[-1], target[-1]))
    elif len(source) == len(target) == 1:
        return nn.Sequential(nn.Linear(source[0], target[0]), *([] if is_last else [nn.ReLU()]))
    return None


def _between_maps(source: tuple[int, ...], target: tuple[int, ...], *, is_last: bool) -> nn.Sequential:
    convolution, norm, pool = AXES[len(source) - 1]
    strides = [max(1, round(before / after)) for before, after in zip(source[1:], target[1:], strict=True)]
    # Patches side by side where the stride is large, so that every position is seen.
    widths, edges = [max(3, stride) for stride in strides], [int(stride <= 2) for stride in strides]
    body = [convolution(source[0], target[0], widths, strides, edges, bias=is_last)]
    if not is_last:
        body += [norm(target[0]), nn.ReLU()]
    given = [
        -(-side // stride) if edge else side // stride for side, stride, edge in zip(source[1:], strides, edges, strict=True)
    ]
    return nn.Sequential(*body, *([] if given == list(target[1:]) else [pool(target[1:])]))

"""Gradient tiles: the gradient of a wide linear layer is added to what earlier chunks have left, some rows of the weight at a time.

Autograd makes the gradient of each chunk as a whole before it adds it: two gradients of the weight's size at once. A tile is a matrix
product of its own, over the same rows of the inputs, so that an element has the same sum; a kernel could divide it otherwise in a tile
than in the whole, and does not in tiles as large as these (tested for one and several threads).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lowmem_pnn.model.layer import Layer
from lowmem_pnn.units import MEBIBYTE

LEAST_BYTES = 8 * MEBIBYTE
"""Size of a weight from which on its gradient is made in tiles."""

_TILE_BYTES = 2 * MEBIBYTE
_TILE_ROWS = 256


class GradientTiles(TorchFunctionMode):
    """Has `F.linear` add the gradients of wide weights in tiles, in backward passes of what runs inside the context.

    For leaves in float32 on which no hooks hang, that no autocast casts, and for inputs of rows (R, features); all else stays as it is.
    The gradient goes into `weight.grad` at once, past autograd: a weight is complete only after backward.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace `F.linear` where that is possible."""
        if func is F.linear and not kwargs and len(args) == 3 and _is_taken(*args):
            return _Linear.apply(*args)
        return func(*args, **(kwargs or {}))


def tiled_bytes(layer: Layer) -> int:
    """Return the bytes of the gradients that are made in tiles, less a tile, where a layer runs in chunks; 0 where there are none.

    Args:
        layer: last layer of a chain, whose values need not be there.
    """
    if layer.compiled is not None or layer.precision.dtype != "fp32":
        return 0
    own = {id(parameter) for parameter in layer.parameters().values()}
    weights = {
        id(module.weight): module.weight
        for module in layer.module.modules()
        if type(module) is nn.Linear and id(module.weight) in own and _is_wide(module.weight)
    }
    return sum(weight.nbytes - _tile_rows(weight) * weight.shape[1] * weight.element_size() for weight in weights.values())


def _is_wide(weight: Tensor) -> bool:
    hooks = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return (
        weight.is_leaf
        and weight.requires_grad
        and not hooks
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and weight.nbytes >= LEAST_BYTES
        and weight.shape[0] > _tile_rows(weight)
    )


def _is_taken(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return x.dim() == 2 and x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type) and _is_wide(weight)


def _tile_rows(weight: Tensor) -> int:
    row_bytes = weight.shape[1] * weight.element_size()
    return max(1, _TILE_BYTES // row_bytes // _TILE_ROWS) * _TILE_ROWS


class _Linear(torch.autograd.Function):
    """`F.linear`, with the products that autograd would do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        of_inputs = gradient.mm(weight) if ctx.needs_input_grad[0] else None
        of_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        if weight.grad is None:
            weight.grad = gradient.t().mm(x)
        else:
            size = _tile_rows(weight)
            for begin in range(0, len(weight), size):
                weight.grad[begin : begin + size] += gradient[:, begin : begin + size].t().mm(x)
        return of_inputs, None, of_bias

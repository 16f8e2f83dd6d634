"""Products: operations whose outputs are dear to compute for their size (matrix products, convolutions, attention), and what they cost."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowmem_pnn.dispatch_mode import DispatchMode
from lowmem_pnn.profiling.costs import Product

_aten = torch.ops.aten
_MATRIX_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten.bmm.default: 0, _aten.baddbmm.default: 1}
"""Matrix products by their overload, with the place of the left factor among the arguments."""
_ATTENTIONS = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
}


def is_product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Decide whether an operation is a product; one that draws random numbers is none, since it has to draw them each time.

    Args:
        func: overload of an ATen operation.
        args: its positional arguments.
        kwargs: its other arguments.
    """
    return (
        func in _MATRIX_PRODUCTS
        or func is _aten.convolution.default
        or (func in _ATTENTIONS and not _dropout(func, args, kwargs))
    )


def cost_of(func: Any, args: Sequence[Any], result: Any) -> Product:
    """Return what a product cost.

    Args:
        func: overload of an ATen operation that `is_product`.
        args: its positional arguments.
        result: what it returned.
    """
    if func in _MATRIX_PRODUCTS:
        return Product(result.numel() * args[_MATRIX_PRODUCTS[func]].shape[-1], result.nbytes)
    if func is _aten.convolution.default:
        weight, transposed = args[1], args[6]
        return Product((args[0] if transposed else result).numel() * math.prod(weight.shape[1:]), result.nbytes)
    query, key, value = args[:3]
    macs = math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return Product(macs, sum(part.nbytes for part in result if isinstance(part, Tensor)))


def _dropout(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("dropout_p")
    return float(args[place] if len(args) > place else kwargs.get("dropout_p", 0.0))


@contextmanager
def products_counted(samples: int) -> Iterator[list[Product]]:
    """Collect the products of a forward inside the context, per sample, in the order of their computing.

    Args:
        samples: number of samples that the forward is given.
    """
    with _Counter(samples) as counter:
        yield counter.products


class _Counter(DispatchMode):
    """Takes down the products among the operations that run."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.products: list[Product] = []
        self._samples = samples

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_product(func, args, kwargs or {}):
            product = cost_of(func, args, result)
            self.products.append(Product(product.macs // self._samples, -(-product.nbytes // self._samples)))
        return result

"""Row gradients: the gradient of an embedding as the rows that were looked up, instead of a matrix as large as the weight.

    ids of a micro-batch      7 3 7        gradients   a b c
    kept                      3 7                      b a+c        sorted, each row once

A row has the bits that it has in autograd's matrix, whose other rows are zeros: the same kernel adds what belongs to a row, in the same
order, and then micro-batches are added up one after the other.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lowmem_pnn.model.layer import Layer


class RowGradients(TorchFunctionMode):
    """Has `F.embedding` keep gradients of given weights as rows, in backward passes of what runs inside the context.

    Args:
        names: names of the weights by the identity of their tensors.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace `F.embedding` of the weights."""
        kwargs = kwargs or {}
        if func is F.embedding and torch.is_grad_enabled():
            ids, weight, padding, is_plain = _arguments(*args, **kwargs)
            name = self._names.get(id(weight))
            if name is not None and is_plain and weight.requires_grad:
                return _Embedding.apply(ids, weight, padding, self, name)
        return func(*args, **kwargs)

    def add(self, name: str, ids: Tensor, gradients: Tensor) -> None:
        """Add gradients of rows that were looked up.

        Args:
            name: name of the weight.
            ids: numbers of the rows (N,).
            gradients: a gradient for each, (N, features).
        """
        own, places = torch.unique(ids.long(), return_inverse=True)
        rows = torch.ops.aten.embedding_dense_backward(gradients, places, len(own), -1, False)
        if name not in self._rows:
            self._rows[name] = own, rows
            return
        before, total = self._rows.pop(name)
        both = torch.unique(torch.cat([before, own]))
        merged = total.new_zeros(len(both), total.shape[1])
        merged[torch.searchsorted(both, before)] = total
        merged.index_add_(0, torch.searchsorted(both, own), rows)
        self._rows[name] = both, merged

    def take(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return for each weight that was looked up in the numbers of its rows, ascending, and their gradients; forget them."""
        rows, self._rows = self._rows, {}
        return rows


def embedding_weights(layer: Layer) -> frozenset[str]:
    """Return the weights of a layer that it uses for nothing but plain embeddings, by their names in the layer.

    Args:
        layer: a layer, whose values need not be there.
    """
    if layer.compiled is not None or layer.precision.dtype != "fp32":
        return frozenset()
    users: dict[int, list[torch.nn.Module]] = {}
    for module in layer.module.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    return frozenset(
        name
        for name, parameter in layer.parameters().items()
        if parameter.requires_grad
        and parameter.dtype == torch.float32
        and parameter.is_contiguous()
        and users.get(id(parameter))
        and all(_is_plain(module) for module in users[id(parameter)])
    )


def _is_plain(module: torch.nn.Module) -> bool:
    return (
        type(module) is torch.nn.Embedding
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
        and "forward" not in vars(module)
    )


def _arguments(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, Tensor, int | None, bool]:
    return ids, weight, padding_idx, max_norm is None and not scale_grad_by_freq and not sparse


class _Embedding(torch.autograd.Function):
    """`F.embedding` whose backward leaves the weight's gradient as rows."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, sink: RowGradients, name: str) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding = None if padding is None else padding % len(weight)
        ctx.sink, ctx.name = sink, name
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        flat, rows = ids.flatten(), gradients[0].reshape(-1, gradients[0].shape[-1])
        if ctx.padding is not None:
            counts = flat != ctx.padding
            if not bool(counts.all()):
                flat, rows = flat[counts], rows[counts]
        ctx.sink.add(ctx.name, flat, rows)
        return None, None, None, None, None

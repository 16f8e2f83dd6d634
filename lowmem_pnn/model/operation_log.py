"""The operation log: the operations that a forward does on fake tensors, what they are given and write to, and what they draw.

Two forwards do the same where their logs are equal.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OperationLog(TorchDispatchMode):
    """A mode that logs the operations on given tensors and on the results, and the storages that operations write to.

    Args:
        tensors: input and weights of a model.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[tuple[Any, ...]] = []
        self.written_storages: set[int] = set()
        self.taken: dict[int, Tensor] = {}
        """Tensors that operations were given, by identity."""
        self.draws = 0
        """Operations that drew random numbers."""
        self.new_bytes = 0
        """Bytes of the tensors that operations made."""
        # The tensors themselves, not their ids alone: an id is used again once its tensor is gone.
        self._dependent = {id(tensor): tensor for tensor in tensors}

    def depends(self, tensor: Tensor) -> bool:
        """Decide whether a tensor is one of the given ones, or was computed from them."""
        return id(tensor) in self._dependent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                self.written_storages |= storages_of(value)
        result = func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        before = storages_of(given)
        self.new_bytes += sum(tensor.nbytes for tensor in tensors_in(result) if tensor.untyped_storage()._cdata not in before)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.draws += 1
        # Constants are computed while tracing, and so not again by the graph; operations of `prim` only query, as for a device.
        if func.namespace == "prim":
            return result
        self.taken.update((id(tensor), tensor) for tensor in given)
        if any(id(tensor) in self._dependent for tensor in given):
            self._dependent.update((id(tensor), tensor) for tensor in tensors_in(result))
            self.entries.append((func, torch.is_grad_enabled(), _comparable((args, kwargs))))
        return result


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a value: itself, or those in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def storages_of(value: Any) -> set[int]:
    """Return the identities of the storages of all tensors in a value."""
    return {tensor.untyped_storage()._cdata for tensor in tensors_in(value)}


def _comparable(value: Any) -> Any:
    """Return arguments of an operation in a form that can be compared with those of another run."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    return [_comparable(item) for item in value] if isinstance(value, (tuple, list)) else repr(value)

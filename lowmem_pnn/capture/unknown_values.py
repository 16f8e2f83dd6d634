"""Unknown values: what a forward does by values of its input, run on fake tensors, which have none.

    x[x > 1], mask.nonzero()      as many as there can be: memory is foreseen for the most
    if flag.any(): ...            no: a condition on values is taken for false
    scale = x.max().item()        one
    pack_padded_sequence(x, n)    sequences that are all of full length

A module that does so directly is never opened, since a trace would freeze what it did; nor is one that is given, by a module inside, a
tensor whose shape is of the kind above. Each of them runs its own code in training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lowmem_pnn.capture.dispatch_modes import has_values, tensors_in, watching_calls
from lowmem_pnn.dispatch_mode import DispatchMode

_aten = torch.ops.aten
# A forward that asks so often waits for a condition to come true.
_MOST_QUESTIONS = 1_000


class UnknownValues(DispatchMode):
    """A mode inside a fake mode that answers what depends on values, and takes down which modules ask.

    Args:
        conditions: what conditions on values are taken for.
        number: what numbers that are taken from values are taken for; whole ones, which may be sizes, are one at most.
    """

    def __init__(self, conditions: bool = False, number: float = 1.0) -> None:
        super().__init__()
        self._conditions = conditions
        self._number = number
        self.asking: set[str] = set()
        """Names of modules that do something by values, or are given a tensor whose shape depends on some."""

        # Modules that took a whole number from values, which may be a size; tensors of the model, whose numbers (counts of batches) are none.
        self._counting: set[str] = set()
        self._own: set[int] = set()
        self._stack = [""]
        self._questions = 0
        # Tensors whose shapes depend on values. The tensors themselves: an id is used again once its tensor is gone.
        self._sized: dict[int, Tensor] = {}
        # Tensors of values, which answers gave: a forward may go by them, and what is computed of them has values too.
        self._answered: dict[int, Tensor] = {}
        self._unpacking = _Unpacking()

    def __enter__(self) -> Any:
        self._unpacking.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._unpacking.__exit__(*error)  # type: ignore[no-untyped-call]

    @contextmanager
    def watching(self, root: nn.Module) -> Iterator[None]:
        """Take down by their names which modules of a model ask, while it runs.

        Args:
            root: the model, or a copy of it.
        """
        names = {module: name for name, module in root.named_modules()}
        self._own = set(map(id, root.buffers()))

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(names.get(module, self._stack[-1]))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()
            leaves = pytree.tree_leaves(output)
            if names.get(module) in self._counting:
                self._sized.update((id(leaf), leaf) for leaf in leaves if isinstance(leaf, Tensor))
            asked = names.get(module) in self.asking
            if any(id(leaf) in self._sized or (asked and isinstance(leaf, bool | int | float)) for leaf in leaves):
                self.asking.add(self._stack[-1])

        with watching_calls(enter, leave):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        if given and all(id(tensor) in self._answered for tensor in given):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
            self._answered.update((id(tensor), tensor) for tensor in tensors_in(result))
            return result
        if func.overloadpacket is _aten._nested_tensor_from_mask_left_aligned:
            return False  # nn.TransformerEncoder in eval mode: nested tensors, which are never larger, cannot be fake
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if all(map(has_values, given)):
                raise  # which are known to who asks
            self._questions += 1
            result = (
                NotImplemented
                if self._questions > _MOST_QUESTIONS
                else _answer(func, args, kwargs, self._conditions, self._number)
            )
            if result is NotImplemented:
                raise
            self.asking.add(self._stack[-1])
            if type(result) is int and id(args[0]) not in self._own:
                self._counting.add(self._stack[-1])
            self._answered.update((id(tensor), tensor) for tensor in tensors_in(result) if has_values(tensor))
            depends, known = True, set()
        else:
            depends = any(id(tensor) in self._sized for tensor in given)
            # What is written into, or added to, a tensor of known sizes has these.
            known = {tensor.shape for tensor in given if id(tensor) not in self._sized} if depends else set()
        if depends:
            self._sized.update(
                (id(tensor), tensor) for tensor in tensors_in(result) if tensor.dim() and tensor.shape not in known
            )
        return result


class _Unpacking(TorchFunctionMode):
    """A mode that pads fake packed sequences, all of which are of full length: PyTorch's own code writes lengths into an empty tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "_pad_packed_sequence" or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        data, batch_sizes, batch_first, padding, length = args
        rows = data.view(len(batch_sizes), -1, *data.shape[1:])
        if length > len(rows):
            rows = torch.cat([rows, rows.new_full((length - len(rows), *rows.shape[1:]), padding)])
        with unset_fake_temporarily():
            lengths = torch.full((rows.shape[1],), len(batch_sizes))
        return rows.transpose(0, 1) if batch_first else rows, lengths


def _answer(func: Any, args: Any, kwargs: Any, conditions: bool, number: float) -> Any:
    """Return what an operation that depends on values returns at most; NotImplemented where that is not known."""
    packet = func.overloadpacket
    if packet is _aten._local_scalar_dense:
        dtype = args[0].dtype
        whole = not (dtype.is_floating_point or dtype.is_complex)
        return conditions if dtype is torch.bool else int(min(number, 1)) if whole else number
    if packet in (_aten.equal, _aten.allclose):
        return conditions
    if packet is _aten.nonzero:
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
    if packet is _aten.masked_select:
        shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
        return args[0].new_empty((shape.numel(),))
    if packet is _aten._unique2:
        flags = dict(zip(("self", "sorted", "return_inverse", "return_counts"), args, strict=False)) | kwargs
        tensor = args[0]
        return (
            tensor.new_empty((tensor.numel(),)),
            tensor.new_empty(tensor.shape if flags.get("return_inverse") else (0,), dtype=torch.int64),
            tensor.new_empty((tensor.numel() if flags.get("return_counts") else 0,), dtype=torch.int64),
        )
    if packet is _aten._pack_padded_sequence:
        batch, length = args[0].shape[:2] if args[2] else args[0].shape[1::-1]
        # Of values, for recurrent layers count by them.
        with unset_fake_temporarily():
            batch_sizes = torch.full((length,), batch)
        return args[0].new_empty((batch * length, *args[0].shape[2:])), batch_sizes
    if packet in (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_):
        return func(args[0], _as_numbers(args[1]), *args[2:], **kwargs)
    return NotImplemented


def _as_numbers(indices: Any) -> list[Tensor | None]:
    """Return indices with the numbers of all elements in the place of each mask."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            numbers.append(index)
        else:
            numbers += [index.new_empty((index.numel(),), dtype=torch.int64) for _ in range(max(index.dim(), 1))]
    return numbers

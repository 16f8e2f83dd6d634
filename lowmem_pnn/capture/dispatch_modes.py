"""Dispatch modes over fake tensors: values that are known although the model's input is not, and the log of operations.

Two forwards do the same where their logs are equal.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from lowmem_pnn.dispatch_mode import DispatchMode, asked_device

KNOWN_BYTES = 1 << 22
"""The most bytes of a tensor whose values are kept."""

_ADDRESS = re.compile(r"\b0x[0-9a-f]+")
_WITHOUT_VALUES = {"empty", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "empty_like"}


def _take_grouped_products_of_any_type() -> None:
    """Let fake tensors take float32 for the products of experts, as the CPU does: PyTorch knows the shapes for bfloat16 alone."""
    registrations: Any = torch._meta_registrations
    of_bfloat16 = getattr(registrations, "_meta_grouped_mm_common", None)
    make_output = getattr(registrations, "_create_grouped_mm_output_tensor", None)
    if of_bfloat16 is None or make_output is None:
        return

    def of_any_type(mat_a: Tensor, mat_b: Tensor, scale_a: Any, scale_b: Any, offs: Any = None, **options: Any) -> Any:
        if scale_a is not None or mat_a.dtype != mat_b.dtype or mat_a.dtype not in (torch.float32, torch.float64):
            return of_bfloat16(mat_a, mat_b, scale_a, scale_b, offs, **options)
        return make_output(mat_a, mat_b, offs, mat_a.dtype)

    registrations._meta_grouped_mm_common = of_any_type


_take_grouped_products_of_any_type()

_LIFTS = torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.mv, _aten.addmv, _aten.dot, _aten.convolution}
"""Operations whose factors have one type: autocast sees to it, but for tensors on another device than its own."""


class KnownValuesError(Exception):
    """Values are not to be known: a forward writes what depends on its input into a tensor that has some, or writes into one that was
    there before; or it multiplies matrices that have some, which autocast would do in a smaller type on another device.
    """


class KnownValues(DispatchMode):
    """A mode that gives values to tensors which depend on sizes and constants alone, as a mask does: a forward may decide by them.

    They are on the CPU. Where fake tensors are on another device, all others are taken there as soon as they meet one.

    Args:
        device_type: training device; tensors that are to be on it are made on the CPU.
        fakes_on: device of the fake tensors.
    """

    def __init__(self, device_type: str, fakes_on: str = "cpu") -> None:
        super().__init__()
        self._device_type, self._fakes_on = device_type, fakes_on
        # Of the tensors that were made here, by their storages, whose identities would be used again once they are gone.
        self._own: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = args, kwargs
        args, kwargs = self._on(args, self._device_type, "cpu"), self._on(kwargs, self._device_type, "cpu")
        written = tensors_in(written_by(func, args, kwargs))
        if not all(map(has_values, tensors_in((args, kwargs)))):
            if storages_of(written) & self._own.keys():
                raise KnownValuesError
            return self._beside_fakes(func, *given)
        if torch.Tag.nondeterministic_seeded in func.tags or func._schema.name.removeprefix("aten::") in _WITHOUT_VALUES:
            return self._beside_fakes(func, *given)
        if not storages_of(written) <= self._own.keys():
            raise KnownValuesError  # a tensor of the user's
        if func.overloadpacket in _PRODUCTS and self._fakes_on != "cpu":
            raise KnownValuesError  # in a type that is not told here
        if not written:
            try:
                result = func(*args, **kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                pass  # which is known here
            else:
                tensors = tensors_in(result)
                if sum(tensor.nbytes for tensor in tensors) > KNOWN_BYTES or any(not tensor.is_cpu for tensor in tensors):
                    return self._beside_fakes(func, *given)
        # What is lifted is the data of a torch.tensor(...) of the forward's own.
        before = set() if func in _LIFTS else storages_of((args, kwargs))
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            if (storage := tensor.untyped_storage()._cdata) not in before:
                self._own[storage] = tensor
        return result

    def _beside_fakes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation whose results have no values, where the fake tensors are."""
        away, here = ("cpu", self._fakes_on) if self._fakes_on != "cpu" else (self._device_type, "cpu")
        types = {one.dtype for one in tensors_in((args, kwargs)) if not has_values(one) and one.is_floating_point()}
        args, kwargs = self._on(args, away, here), self._on(kwargs, away, here)
        if func.overloadpacket in _PRODUCTS and here != "cpu" and len(types) == 1:
            (dtype,) = types
            args, kwargs = _in_type(dtype, (args, kwargs))
        return func(*args, **kwargs)

    def _on(self, value: Any, away: str, here: str) -> Any:
        """Return arguments with one device in the place of another; beside fake tensors elsewhere, tensors with values as fake ones."""
        if isinstance(value, torch.device):
            return torch.device(here) if value.type == away else value
        if isinstance(value, Tensor):
            if here == "cpu" or not has_values(value):
                return value
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=here)
        if isinstance(value, dict):
            return {key: self._on(item, away, here) for key, item in value.items()}
        return type(value)(self._on(item, away, here) for item in value) if type(value) in (tuple, list) else value


def _in_type(dtype: torch.dtype, value: Any) -> Any:
    """Return arguments with their tensors of floating-point numbers in one type."""
    return pytree.tree_map_only(Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, value)


@contextmanager
def watching_calls(enter: Callable[[nn.Module, Any], None], leave: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    """Call functions before and after every call of any module.

    Args:
        enter: is given the module and its arguments.
        leave: is given the module, its arguments, and what it returns.
    """
    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class OperationLog(DispatchMode):
    """A mode that logs the operations on given tensors and on the results, and the storages that operations write to.

    Args:
        tensors: input and weights of a model.
        most: most operations; None for any number.
    """

    running: ClassVar[list["OperationLog"]] = []
    """Logs that operations go to, the outermost first."""

    def __init__(self, tensors: Iterable[Tensor], most: int | None = None) -> None:
        super().__init__()
        self._most = math.inf if most is None else most
        self.repeats: list[tuple[nn.Module, nn.Module]] = []
        """Blocks that did as others before them, with these."""
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

    def __enter__(self) -> Any:
        self.running.append(self)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.running.remove(self)

    def add_dependent(self, tensor: Tensor) -> None:
        """Take a tensor for computed from the given ones."""
        self._dependent[id(tensor)] = tensor

    def depends(self, tensor: Tensor) -> bool:
        """Decide whether a tensor is one of the given ones, or was computed from them."""
        return id(tensor) in self._dependent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (device := asked_device(func, args)) is not None:
            return device
        kwargs = kwargs or {}
        self.written_storages |= storages_of(written_by(func, args, kwargs))
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
            if len(self.entries) >= self._most:
                raise RuntimeError(f"a forward of more than {self._most:,} operations")
            self._dependent.update((id(tensor), tensor) for tensor in tensors_in(result))
            self.entries.append((func, torch.is_grad_enabled(), _comparable((args, kwargs))))
        return result


def written_by(operation: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return those arguments of an operation that it changes in place."""
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(operation._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


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
        return tuple(value.shape), value.stride(), value.dtype, _content(value)
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    return [_comparable(item) for item in value] if isinstance(value, (tuple, list)) else repr(value)


def has_values(tensor: Tensor) -> bool:
    """Decide whether a tensor is not fake, and so depends on sizes and constants alone."""
    return not isinstance(tensor, FakeTensor) and tensor.is_cpu and not tensor.requires_grad


def without_addresses(log: str) -> str:
    """Return the text of a log without the addresses of objects, which are others in every process."""
    return _ADDRESS.sub("", log)


class _Content(str):
    """What stands for the values of a tensor."""


def without_values(log: Any) -> Any:
    """Return a log of operations, or a part of it, with the shapes and types of tensors alone."""
    if isinstance(log, dict):
        return {key: without_values(item) for key, item in log.items()}
    if isinstance(log, tuple | list):
        return [without_values(item) for item in log]
    return "" if isinstance(log, _Content) else log


def _content(tensor: Tensor) -> str:
    """Return what stands for the values of a tensor that has them, and is not large."""
    if isinstance(tensor, FakeTensor) or not tensor.is_cpu or tensor.nbytes > KNOWN_BYTES or tensor.layout != torch.strided:
        return ""
    with unset_fake_temporarily():
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
        return _Content(hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest())

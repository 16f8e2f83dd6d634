"""Proxies for tensors while a forward is traced: they answer what is known, and record what torch.fx by itself would miss.

Changes in place, functions that make tensors of a proxy's size, and `torch.autograd.Function`s become nodes of the graph.
"""

import builtins
import functools
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowmem_pnn.capture.examples import are_plain, is_known

# What a tensor answers in numbers and types, which are the same whatever its values are.
_PROPERTIES = frozenset({
    "ndim", "dtype", "layout", "itemsize", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_mps", "is_meta",
})  # fmt: skip
_METHODS = frozenset({
    "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex", "is_signed", "is_contiguous", "element_size",
    "storage_offset", "is_conj", "is_neg",
})  # fmt: skip


_CONSTANTS = (bool, int, float, str, type(None), torch.dtype)


class Proxy(fx.Proxy):
    """A proxy that answers from examples what is known of its value, and records in-place changes.

    Sizes but the batch's are plain numbers, and so are types and numbers of axes; the batch's size is a proxy. torch.fx by itself takes
    `x += y` for `x = x + y`, and has no `x[i] = y`.
    """

    def __getattr__(self, k: str) -> Any:
        if k in ("node", "tracer", "root", "_node"):
            raise AttributeError(k)
        if k == "shape":
            return self.size() if self._are_tensors() else Attribute(self, k)
        if k in _PROPERTIES and (values := self._plain(lambda tensor: getattr(tensor, k))) is not None:
            return values[0]
        if k in _METHODS and self._are_tensors():
            return functools.partial(self._ask, k)
        return Attribute(self, k)

    def size(self, dim: int | None = None) -> Any:
        """Return the size of an axis, or of all: numbers, but for what depends on the number of samples."""
        if not self._are_tensors():
            return self.tracer.create_proxy("call_method", "size", (self,) if dim is None else (self, dim), {})
        shapes = [tuple(value.shape) for value in self._values() or ()]
        rank = len(shapes[0])
        if dim is not None:
            axis = range(rank)[dim]
            sizes = {shape[axis] for shape in shapes}
            return sizes.pop() if len(sizes) == 1 else BatchSize(self, axis)
        return Shape(self.size(axis) for axis in range(rank))

    def keys(self) -> Any:
        """Return the keys of a dict."""
        values = self._values()
        return list(values[0].keys()) if values and isinstance(values[0], Mapping) else super().keys()

    def values(self) -> Any:
        """Return the values of a dict."""
        values = self._values()
        return [self[key] for key in values[0]] if values and isinstance(values[0], Mapping) else Attribute(self, "values")()

    def items(self) -> Any:
        """Return keys and values of a dict."""
        values = self._values()
        if values and isinstance(values[0], Mapping):
            return [(key, self[key]) for key in values[0]]
        return Attribute(self, "items")()

    def __bool__(self) -> bool:
        return bool(self._number(bool))

    def __int__(self) -> int:
        return int(self._number(int))

    def __index__(self) -> int:
        return int(self._number(operator.index))

    def __float__(self) -> float:
        return float(self._number(float))

    def __len__(self) -> int:
        return int(self._number(len, tensors=True))

    def __contains__(self, key: Any) -> bool:
        values = self._values()
        if values and isinstance(values[0], Mapping):
            return key in values[0]
        return any(item is key or item == key for item in self)

    def __iter__(self) -> Iterator[Any]:
        values = self._values()
        if values is None or isinstance(values[0], int | float):
            return iter(self.tracer.iter(self))
        if isinstance(values[0], Mapping):
            return iter(list(values[0]))
        count = self.__len__()
        rows: Any = self.tracer.create_proxy("call_method", "unbind", (self, 0), {}) if isinstance(values[0], Tensor) else self
        return iter([rows[number] for number in range(count)])

    def __getitem__(self, key: Any) -> Any:
        item: Any = self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})
        return item if self._are_tensors() else item.constant()

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def constant(self) -> Any:
        """Return a number, text, or nothing, where it is the same for any number of samples; else the proxy itself."""
        values = self._values()
        if values is None or not isinstance(values[0], _CONSTANTS) or any(value != values[0] for value in values):
            return self
        if self.tracer.depends_on_batch(self.node):  # type: ignore[attr-defined]
            return self
        self.node.meta["is_constant"] = True
        return values[0]

    def has_type(self, kinds: Any) -> bool:
        """Decide whether what the proxy stands for is of some class.

        Args:
            kinds: a class, or several, as `isinstance` takes them.
        """
        values = self._values()
        return values is not None and isinstance(values[0], kinds)

    def is_known(self) -> bool:
        """Decide whether the proxy stands for a tensor that depends on sizes and constants alone."""
        values = self._values()
        return bool(values) and all(map(is_known, values or ()))

    def length(self) -> Any:
        """Return the number of items: a proxy where these are the samples."""
        # Not by `len`, which asks for this while a forward is traced.
        return self.size(0) if self._are_tensors() else self.__len__()

    def _values(self) -> tuple[Any, ...] | None:
        found: tuple[Any, ...] | None = self.tracer.values_of(self.node)  # type: ignore[attr-defined]
        return found

    def _are_tensors(self) -> bool:
        values = self._values()
        return bool(values) and all(isinstance(value, Tensor) for value in values or ())

    def _plain(self, ask: Callable[[Any], Any]) -> list[Any] | None:
        """Return the answers of the examples, where they are tensors and give the same."""
        if not self._are_tensors():
            return None
        answers = [ask(value) for value in self._values() or ()]
        return answers if are_plain(answers) and all(answer == answers[0] for answer in answers) else None

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or (answers := self._plain(lambda tensor: getattr(tensor, method)())) is None:
            return self.tracer.create_proxy("call_method", method, (self, *args), kwargs)
        return answers[0]

    def _number(self, convert: Callable[[Any], Any], tensors: bool = False) -> Any:
        """Convert to a number or a truth what has the same one in all examples."""
        values = self._values()
        if values is None or not (tensors or are_plain(values) or self.is_known()):
            raise fx.proxy.TraceError("control flow")
        with unset_fake_temporarily():
            numbers = [convert(value) for value in values]
        if any(number != numbers[0] for number in numbers):
            raise BatchError("decides something by the number of samples, which is another one in each batch")
        self.tracer.asked_of(self.node, convert, numbers[0])  # type: ignore[attr-defined]
        return numbers[0]


class BatchError(Exception):
    """A forward asks for the number of samples where it has to be a number."""


class Attribute(Proxy):
    """An attribute of a proxy; its node is made when it is used."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        self.root, self.attr, self.tracer = root, attr, root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The node that reads the attribute."""
        if self._node is None:
            self._node = self._make().node
        return self._node

    def _make(self) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


class BatchSize(Attribute):
    """A size that depends on the number of samples."""

    def __init__(self, root: fx.Proxy, axis: int) -> None:
        super().__init__(root, "size")
        self._axis = axis

    def _make(self) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", "size", (self.root, self._axis), {})


class Shape(tuple[Any, ...]):
    """The sizes of a proxy's tensor, as `torch.Size` has them."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Shape(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> Any:
        return Shape(super().__add__(tuple(other)))

    def __radd__(self, other: Any) -> Any:
        return Shape((*other, *self))

    def numel(self) -> Any:
        """Return the product of the sizes."""
        return functools.reduce(operator.mul, self, 1)


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in (
    "iadd",
    "iand",
    "ifloordiv",
    "ilshift",
    "imatmul",
    "imod",
    "imul",
    "ior",
    "ipow",
    "irshift",
    "isub",
    "itruediv",
    "ixor",
):
    setattr(Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


# Functions of torch that make a tensor, and so are not told of proxies among their arguments.
_FACTORIES = (
    "zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm", "arange", "range", "eye", "linspace", "logspace", "tensor",
    "as_tensor", "scalar_tensor", "empty_strided", "tril_indices", "triu_indices",
)  # fmt: skip
# Of these packages, whose code has to tell proxies from tensors.
_OURS = ("torch.", "lowmem_pnn.")


_APPLY = torch.autograd.Function.__dict__["apply"]


@functools.cache
def _apply_of(kind: type) -> Callable[..., Any]:
    """Return the function that applies a `torch.autograd.Function`, the same one each time."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return _APPLY.__get__(None, kind)(*args, **kwargs)

    call.__name__, call.__module__ = f"{kind.__name__}_apply", kind.__module__
    return call


_KINDS = frozenset({Proxy, Attribute, BatchSize})


@contextmanager
def recorded_calls(tracer: fx.Tracer) -> Iterator[None]:
    """Record calls that torch.fx does not see: of functions that make tensors of a proxy's size, and of `torch.autograd.Function`s.

    Args:
        tracer: tracer whose graph gets the calls.
    """

    def record(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _holds_proxy((args, kwargs)):
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: record(function, args, kwargs)

    def recording_apply(kind: type, *args: Any, **kwargs: Any) -> Any:
        return record(_apply_of(kind), args, kwargs)

    is_instance, length = builtins.isinstance, builtins.len

    def has_type(value: Any, kinds: Any) -> bool:
        if is_instance(kinds, tuple | types.UnionType):
            return any(has_type(value, kind) for kind in (kinds if is_instance(kinds, tuple) else kinds.__args__))
        # What asks for proxies wants to know whether there is a value to decide by.
        return not value.is_known() if kinds is fx.Proxy else is_instance(value, kinds) or bool(value.has_type(kinds))

    def knowing_isinstance(value: Any, kinds: Any) -> bool:
        if type(value) not in _KINDS or sys._getframe(1).f_globals.get("__name__", "").startswith(_OURS):
            return is_instance(value, kinds)
        return has_type(value, kinds)

    def knowing_len(value: Any) -> Any:
        return value.length() if type(value) in _KINDS else length(value)

    factories = {name: getattr(torch, name) for name in _FACTORIES}
    for name, factory in factories.items():
        setattr(torch, name, recording(factory))
    torch.autograd.Function.apply = classmethod(recording_apply)
    vars(builtins).update(isinstance=knowing_isinstance, len=knowing_len)
    try:
        yield
    finally:
        vars(builtins).update(isinstance=is_instance, len=length)
        for name, factory in factories.items():
            setattr(torch, name, factory)
        torch.autograd.Function.apply = _APPLY


def _holds_proxy(value: Any) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    return any(map(_holds_proxy, value)) if isinstance(value, tuple | list) else isinstance(value, fx.Proxy)

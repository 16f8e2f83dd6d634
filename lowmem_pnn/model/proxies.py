"""Proxies for tensors while a forward is traced: they record what torch.fx by itself would miss.

Changes in place, functions that make tensors of a proxy's size, and `torch.autograd.Function`s become nodes of the graph.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree


class Proxy(fx.Proxy):
    """A proxy that records in-place changes: torch.fx takes `x += y` for `x = x + y`, and has no `x[i] = y`."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


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
_FACTORIES = ("zeros", "ones", "empty", "full", "rand", "randn", "arange", "eye", "linspace", "tensor")


_APPLY = torch.autograd.Function.__dict__["apply"]


@functools.cache
def _apply_of(kind: type) -> Callable[..., Any]:
    """Return the function that applies a `torch.autograd.Function`, the same one each time."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return _APPLY.__get__(None, kind)(*args, **kwargs)

    call.__name__, call.__module__ = f"{kind.__name__}_apply", kind.__module__
    return call


@contextmanager
def recorded_calls(tracer: fx.Tracer) -> Iterator[None]:
    """Record calls that torch.fx does not see: of functions that make tensors of a proxy's size, and of `torch.autograd.Function`s.

    Args:
        tracer: tracer whose graph gets the calls.
    """

    def record(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: record(function, args, kwargs)

    def recording_apply(kind: type, *args: Any, **kwargs: Any) -> Any:
        return record(_apply_of(kind), args, kwargs)

    factories = {name: getattr(torch, name) for name in _FACTORIES}
    for name, factory in factories.items():
        setattr(torch, name, recording(factory))
    torch.autograd.Function.apply = classmethod(recording_apply)
    try:
        yield
    finally:
        for name, factory in factories.items():
            setattr(torch, name, factory)
        torch.autograd.Function.apply = _APPLY

"""Outer state: what code of a model can reach outside of its modules, and change: globals, attributes of classes, closures.

calls = 0                  in a file of the user's, `global calls; calls += 1` in a forward
Net.calls += 1             in a forward, or in the backward of an `autograd.Function`

It belongs to no module, so that it is neither kept with a run nor restored before a layer runs once more.
"""

import collections
import functools
import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowmem_pnn.model.python_state import freeze

# Collections and arrays that are larger are compared by identity and length.
_MOST_ITEMS, _MOST_BYTES = 10_000, 1 << 20
_STATEFUL = (
    *(bool, int, float, str, type(None), list, tuple, dict, set, frozenset, collections.deque, np.ndarray),
    *(Tensor, torch.Generator, random.Random, np.random.Generator, np.random.RandomState),
)


class OuterState:
    """The state outside of a model's modules at one moment, to be compared with later.

    Args:
        model: any module; only code that is no library's is looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._frozen = {place: _summary(value) for place, value in _reachable(model)}

    def changed(self, model: nn.Module) -> list[str]:
        """Return in words the places whose values are other than they were.

        Args:
            model: the same module.
        """
        return [place for place, value in _reachable(model) if place in self._frozen and _summary(value) != self._frozen[place]]


def _reachable(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the values that code of a model's modules can reach, each with its place in words."""
    starts: list[Any] = []
    for module in model.modules():
        starts += [cls for cls in type(module).__mro__ if not _is_library(cls.__module__)]
        starts += [value for value in vars(module).values() if callable(value)]
        for hooks in (value for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict)):
            starts += hooks.values()
    for parameter in model.parameters():
        starts += [
            *(parameter._backward_hooks or {}).values(),
            *(getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values(),
        ]
    waiting, seen = [("", start) for start in starts], set()
    while waiting:
        place, value = waiting.pop()
        if id(value) in seen and not isinstance(value, _STATEFUL):
            continue
        seen.add(id(value))
        if isinstance(value, functools.partial):
            waiting.append((place, value.func))
        elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
            waiting.append((place, value.__func__))
        elif isinstance(value, property):
            waiting.append((place, value.fget))
        elif isinstance(value, types.FunctionType):
            if not _is_library(value.__module__):
                waiting += _of_function(value)
        elif isinstance(value, type):
            if not _is_library(value.__module__):
                waiting += [
                    (f"{value.__qualname__}.{name}", item) for name, item in vars(value).items() if not name.startswith("__")
                ]
        elif place and (isinstance(value, _STATEFUL) or _is_plain_object(value)):
            yield place, value


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the globals that a function names, and what its closure holds."""
    codes, names = [function.__code__], set[str]()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    for name in sorted(names & function.__globals__.keys()):
        yield f"the global {name!r} of {function.__module__}", function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        if cell != types.CellType():  # one that was never filled has no contents
            yield f"the variable {name!r} around {function.__qualname__}", cell.cell_contents


def _summary(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return freeze(value) if value.nbytes <= _MOST_BYTES and value.dtype != object else id(value)
    if isinstance(value, (list, tuple, dict, set, frozenset, collections.deque)) and len(value) > _MOST_ITEMS:
        return id(value), len(value)
    return freeze(value)


def _is_plain_object(value: Any) -> bool:
    return (
        (hasattr(value, "__dict__") or hasattr(value, "__slots__"))
        and not isinstance(value, (nn.Module, types.ModuleType))
        and not _is_library(type(value).__module__)
    )


def _is_library(module: str | None) -> bool:
    """Decide whether a module, by name, is part of Python or installed: such code keeps caches, and no state of a model."""
    if module is None or (module.partition(".")[0] in sys.stdlib_module_names and module != "__main__"):
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file or module.partition(".")[0] == __name__.partition(".")[0]

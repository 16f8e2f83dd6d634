"""Python state of modules: what a forward changes that is no parameter and no buffer, to be saved, restored, or refused.

self.calls += 1            a number (or text, or lists and dicts of such): kept, in commits too
self.hidden = h            a tensor that the next forward reads: refused; a buffer is the place for it
self.features = x          a tensor that no forward reads: let be
"""

import collections
import copy
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What a module keeps for itself; `training` belongs to the mode.
_OWN = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weights_names"}
_PLAIN = (bool, int, float, str, type(None))
# Objects inside of objects that are looked into.
_MAX_DEPTH = 6
_FUNCTIONS = types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType
_LIBRARIES = frozenset({"torch", "numpy", "functools", "operator", "builtins"})

Attribute = tuple[str, str]
"""A module's qualified name, and the name of one of its attributes."""


class _Same:
    """An object that is compared by identity, and kept alive so that its identity stays its own."""

    def __init__(self, value: object) -> None:
        self.value = value
        self.version = version_of(value) if isinstance(value, Tensor) else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value and other.version == self.version

    __hash__ = None  # type: ignore[assignment]


def version_of(tensor: Tensor) -> int:
    """Return the version of a tensor, which changes where it is changed in place; one of inference mode has none."""
    return 0 if tensor.is_inference() else tensor._version


def attributes_of(model: nn.Module) -> dict[Attribute, Any]:
    """Return the Python attributes of all modules, each module once.

    Args:
        model: any module.
    """
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in _OWN
    }


class Snapshot:
    """The Python attributes of a model's modules at one moment, to be compared with later.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._frozen = {key: freeze(value) for key, value in attributes_of(model).items()}

    def changed(self, model: nn.Module) -> list[Attribute]:
        """Return the attributes that are there now and are new or other than they were, and those that are gone."""
        now = attributes_of(model)
        gone = [key for key in self._frozen if key not in now]
        return gone + [key for key, value in now.items() if key not in self._frozen or freeze(value) != self._frozen[key]]


def freeze(value: Any, depth: int = 0) -> Any:
    """Return what is compared of a value: numbers and text by value, containers and plain objects by content, the rest by identity.

    Args:
        value: any value.
        depth: containers and objects that it is in.
    """
    if isinstance(value, _PLAIN):
        return type(value), repr(value)  # NaN equals itself, and 0.0 is not -0.0
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        value = value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        value = value.get_state(legacy=False)
    if isinstance(value, itertools.count):
        return repr(value)
    if depth > _MAX_DEPTH or isinstance(value, (Tensor, nn.Module, type)) or _is_function(value):
        return _Same(value)
    if isinstance(value, Mapping):
        return type(value), [(freeze(key, depth + 1), freeze(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), [freeze(item, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, value))
    if hasattr(value, "tobytes"):
        return value.tobytes()
    if hasattr(value, "getstate"):
        return freeze(value.getstate(), depth + 1)
    if content := _content_of(value):
        return _Same(value), freeze(content, depth + 1)
    return _Same(value)


def _is_function(value: Any) -> bool:
    """Decide whether a value is a function or what libraries make of one, and no object of the user's that can be called, with state."""
    return isinstance(value, _FUNCTIONS) or (callable(value) and type(value).__module__.partition(".")[0] in _LIBRARIES)


def _content_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots too; of Python's own classes these hold caches."""
    content = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        if cls.__module__.partition(".")[0] not in sys.stdlib_module_names:
            slots = vars(cls).get("__slots__", ())
            names = [slots] if isinstance(slots, str) else [*slots]
            content |= {
                name: getattr(value, name) for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)
            }
    return content


def is_kept(value: Any) -> bool:
    """Decide whether a value can be kept with a run, as JSON: numbers, text, a tuple of such, and lists and dicts."""
    if isinstance(value, _PLAIN):
        return True
    if type(value) is tuple:
        return all(isinstance(item, _PLAIN) for item in value)
    if type(value) is list:
        return all(is_kept(item) and type(item) is not tuple for item in value)
    return type(value) is dict and all(
        isinstance(key, str) and is_kept(item) and type(item) is not tuple for key, item in value.items()
    )


def holds_tensor(value: Any) -> bool:
    """Decide whether a value is a tensor, or a container with one."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, Tensor) or (
        isinstance(value, (list, tuple, set, collections.deque)) and any(map(holds_tensor, value))
    )


def modules_in(value: Any) -> list[nn.Module]:
    """Return the modules in a value: itself, or those in tuples, lists and dicts."""
    if isinstance(value, nn.Module):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [module for item in items for module in modules_in(item)]


class NotKeptError(Exception):
    """What a forward left in an attribute was read by the next forward."""


class _Unreadable:
    """Stands in the place of an attribute's value: whoever reads it raises."""

    def _raise(self, *_: Any, **__: Any) -> Any:
        raise NotKeptError

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise NotKeptError


for _name in (
    *("getattr", "call", "bool", "len", "iter", "getitem", "setitem", "contains", "int", "float", "index", "neg", "hash", "next"),
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv"),
    *("rtruediv", "floordiv", "mod", "pow", "matmul", "rmatmul", "and", "or", "xor", "invert", "abs", "round", "format", "str"),
):
    setattr(_Unreadable, f"__{_name}__", _Unreadable._raise)


def is_read(model: nn.Module, attribute: Attribute, forward: Callable[[], object]) -> bool:
    """Decide whether a forward reads what an attribute held before it.

    Args:
        model: module that holds the attribute.
        attribute: the attribute, whose value is restored.
        forward: runs the model; whatever it raises is taken for a read.
    """
    own, name = vars(model.get_submodule(attribute[0])), attribute[1]
    if name not in own:
        return True
    before, own[name] = own[name], _Unreadable()
    try:
        forward()
    except Exception:  # NotKeptError, or whatever a forward makes of it
        return True
    finally:
        own[name] = before
    return False


def read_state(model: nn.Module, attributes: Iterable[Attribute]) -> dict[str, Any]:
    """Return attributes by module and attribute ("block.calls"), copies of what is kept; those that are not there are left out.

    Args:
        model: module that holds them.
        attributes: the attributes.
    """
    state = {}
    for name, attribute in attributes:
        own = vars(model.get_submodule(name))
        if attribute in own:
            state[f"{name}.{attribute}"] = _copied(own[attribute])
    return state


def write_state(model: nn.Module, attributes: Iterable[Attribute], state: Mapping[str, Any]) -> None:
    """Set attributes to copies of what `read_state` returned.

    Args:
        model: module that holds them.
        attributes: the attributes.
        state: their values; an attribute without one is deleted.
    """
    for name, attribute in attributes:
        own, key = vars(model.get_submodule(name)), f"{name}.{attribute}"
        if key in state:
            value = _copied(state[key])
            own[attribute] = tuple(value) if isinstance(own.get(attribute), tuple) and isinstance(value, list) else value
        else:
            own.pop(attribute, None)


def write_by_name(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Set all attributes that `read_state` returned, but for those of modules that a model does not have.

    Args:
        model: any module.
        state: values by module and attribute.
    """
    modules = {name for name, _ in model.named_modules()}
    places = [(module, attribute) for module, _, attribute in (name.rpartition(".") for name in state)]
    write_state(model, [place for place in places if place[0] in modules], state)


def read_changed(model: nn.Module, first: Mapping[Attribute, Any]) -> dict[str, Any]:
    """Return those of some attributes that are not what they were at first, as `read_state` does; what cannot be kept is left out.

    Args:
        model: module that holds them.
        first: their first values.
    """
    state = {}
    for (name, attribute), value in first.items():
        own = vars(model.get_submodule(name))
        now = own.get(attribute, value)
        if now is not value and is_kept(now) and freeze(now) != freeze(value):
            state[f"{name}.{attribute}"] = _copied(now)
    return state


def write_changed(model: nn.Module, first: Mapping[Attribute, Any], state: Mapping[str, Any]) -> None:
    """Set attributes to copies of what `read_changed` returned, and the others of them to their first values.

    Args:
        model: module that holds them.
        first: their first values.
        state: the values of those that were others.
    """
    for (name, attribute), value in first.items():
        own = vars(model.get_submodule(name))
        now, wanted = own.get(attribute), state.get(f"{name}.{attribute}", value)
        if now is not wanted and is_kept(now):
            own[attribute] = tuple(wanted) if isinstance(value, tuple) and isinstance(wanted, list) else _copied(wanted)


def _copied(value: Any) -> Any:
    return copy.deepcopy(value) if is_kept(value) else value


@contextmanager
def state_restored(model: nn.Module, attributes: Iterable[Attribute]) -> Iterator[None]:
    """Restore attributes at the end of the context.

    Args:
        model: module that holds them.
        attributes: the attributes.
    """
    attributes = tuple(attributes)
    state = read_state(model, attributes)
    try:
        yield
    finally:
        write_state(model, attributes, state)

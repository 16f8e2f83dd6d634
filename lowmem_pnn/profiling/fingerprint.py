"""Fingerprint of a layer: an equality key of layers that compute the same, so that measurements of one hold for the others.

Two layers have equal fingerprints when their graphs have the same operations in the same order, on modules of the same types, with the
same settings and with tensors of the same shapes, and their modules have the same modes. A setting that is a block's number in the list
that it stands in (`layer_idx`) may differ, where both did the same operations while their model was captured. Settings that are no plain
values are compared by identity: functions and classes that their module names, which last, and any other object (a lambda, an object of
the user's).
"""

import re
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowmem_pnn.model.layer import Layer

# Attributes of every module: tensors and submodules are compared apart, and the mode is not compared.
_MODULE_ATTRIBUTES = frozenset({*vars(nn.Module()), "training"})
# Names of settings that may be a module's number in a list, as `layer_idx`.
_PLACE = re.compile(r"(^|_)(i|id|idx|index|no|number|layer|depth)$")
_PLAIN_TYPES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.Size,
    torch.memory_format,
    slice,
    type(Ellipsis),
)


@dataclass(frozen=True)
class _Identity:
    """The identity of an object, which another one may have when it is gone."""

    number: int


def lasts(key: Hashable) -> bool:
    """Decide whether a key that holds fingerprints is valid without the layers that these were made of.

    Args:
        key: tuples of plain values and of what `layer_fingerprint` returned.
    """
    if isinstance(key, tuple):
        return all(map(lasts, key))
    return not isinstance(key, _Identity)


def layer_fingerprint(layer: Layer) -> Hashable:
    """Return a key that is equal for layers that compute the same.

    Args:
        layer: layer whose tensors may be on the meta device. The key may hold identities of its objects, and is then valid only as long
            as the layer exists (`lasts`).
    """
    module = layer.module
    numbers: dict[fx.Node, int] = {}
    assert isinstance(module, fx.GraphModule)
    steps: list[Hashable] = []
    for node in module.graph.nodes:
        numbers[node] = len(numbers)
        if node.op == "call_module":
            places = [int(part) for part in str(node.target).split(".") if part.isdigit()] if layer.operations else []
            target: Hashable = _module_key(module.get_submodule(str(node.target)), places)
        elif node.op == "get_attr":
            path, _, attribute = str(node.target).rpartition(".")
            target = _value_key(getattr(module.get_submodule(path), attribute))
        elif node.op == "placeholder":
            target = None
        else:
            target = node.target if isinstance(node.target, str) else _value_key(node.target)
        steps.append((node.op, target, _value_key((node.args, dict(node.kwargs)), numbers)))
    # One tensor under two names, inside a layer.
    tensors = [*layer.parameters().values(), *layer.buffers().values()]
    first_index: dict[int, int] = {}
    ties = tuple(first_index.setdefault(id(tensor), index) for index, tensor in enumerate(tensors))
    head = None if layer.head is None else _module_key(layer.head)
    modes = _value_key((layer.modes.in_train, layer.modes.in_eval, layer.kept))
    return tuple(steps), tuple(map(_value_key, tensors)), ties, head, modes, layer.precision, layer.operations


def _module_key(module: nn.Module, places: Sequence[int] = ()) -> Hashable:
    """Return a key of a module's type, settings, tensors and submodules.

    Args:
        module: any module.
        places: its numbers in the lists that it is in; settings that are such a number count as equal.
    """
    settings = tuple(
        (name, ("place", places.index(value)) if _is_place(name, value, places) else _value_key(value))
        for name, value in sorted(vars(module).items())
        if name not in _MODULE_ATTRIBUTES
    )
    hooks = tuple(_Identity(id(module)) for name, value in vars(module).items() if name.endswith("_hooks") and value)
    tensors = tuple(
        (name, None if tensor is None else _value_key(tensor))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    children = tuple((name, None if child is None else _module_key(child, places)) for name, child in module._modules.items())
    return type(module), settings, hooks, tensors, children


def _is_place(name: str, value: Any, places: Sequence[int]) -> bool:
    """Decide whether a setting is a module's number in a list, by its name and its value."""
    return type(value) is int and value in places and _PLACE.search(name) is not None


def _value_key(value: Any, numbers: Mapping[fx.Node, int] | None = None) -> Hashable:
    """Return a key of a setting or an argument: of a tensor its shape, of a node its number, of other objects their identity."""
    if isinstance(value, Tensor):
        return type(value), tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    if isinstance(value, fx.Node):
        assert numbers is not None
        return "node", numbers[value]
    if isinstance(value, tuple | list | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return type(value).__name__, tuple(_value_key(item, numbers) for item in items)
    if isinstance(value, dict):
        return "dict", tuple((_value_key(key), _value_key(item, numbers)) for key, item in value.items())
    if isinstance(value, slice):
        return "slice", _value_key(value.start, numbers), _value_key(value.stop, numbers), _value_key(value.step, numbers)
    # 1, 1.0 and True are equal, but not the same to an operation.
    if isinstance(value, _PLAIN_TYPES):
        return type(value), value
    return "the", value if _is_named_by_its_module(value) else _Identity(id(value))


def _is_named_by_its_module(value: Any) -> bool:
    """Decide whether a value is a function or a class at the top of a module, or of PyTorch's own making: it lasts as they do."""
    if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return True
    if isinstance(value, BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, type | ModuleType)
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not callable(value) or not isinstance(module, str) or not isinstance(name, str):
        return False
    return vars(sys.modules.get(module, object)).get(name) is value

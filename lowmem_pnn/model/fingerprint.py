"""Likeness: which layers of a chain do the same, so that what was measured of one holds for the others.

Two layers are alike when their graphs have the same operations in the same order, on modules of the same types, with the same settings
and with tensors of the same shapes. A setting that is no plain value (a function, an object of a user's) has to be the very same one.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowmem_pnn.model.chain import Layer

# What every module has: its tensors and modules are looked at apart, and its mode is whoever runs it's choice.
_OWN = frozenset({*vars(nn.Module()), "training"})
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, torch.memory_format, slice, type(Ellipsis))


def layer_fingerprint(layer: Layer) -> Hashable:
    """A value that is equal for layers that do the same.

    Args:
        layer: its tensors may be on the meta device. Graphs hold functions and modules, so that values of layers that are gone mean
            nothing.
    """
    module = layer.module
    number: dict[fx.Node, int] = {}
    assert isinstance(module, fx.GraphModule)
    steps: list[Hashable] = []
    for node in module.graph.nodes:
        number[node] = len(number)
        if node.op == "call_module":
            target: Hashable = _module(module.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            path, _, attribute = str(node.target).rpartition(".")
            target = _value(getattr(module.get_submodule(path), attribute))
        elif node.op == "placeholder":
            target = None
        else:
            target = node.target if isinstance(node.target, str) else _value(node.target)
        steps.append((node.op, target, _value((node.args, dict(node.kwargs)), number)))
    # One tensor under two names, inside a layer.
    tensors = [*layer.parameters().values(), *layer.buffers().values()]
    places: dict[int, int] = {}
    ties = tuple(places.setdefault(id(tensor), place) for place, tensor in enumerate(tensors))
    head = None if layer.head is None else _module(layer.head)
    return tuple(steps), tuple(map(_value, tensors)), ties, head, layer.precision


def _module(module: nn.Module) -> Hashable:
    """Type, settings, tensors and modules of a module."""
    settings = tuple((name, _value(value)) for name, value in sorted(vars(module).items()) if name not in _OWN)
    hooks = tuple(id(module) for name, value in vars(module).items() if name.endswith("_hooks") and value)
    tensors = tuple(
        (name, None if tensor is None else _value(tensor))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    inside = tuple((name, None if child is None else _module(child)) for name, child in module._modules.items())
    return type(module), settings, hooks, tensors, inside


def _value(value: Any, number: Mapping[fx.Node, int] | None = None) -> Hashable:
    """A setting, or an argument: tensors by their shapes, nodes by their place, plain values as they are, others by identity."""
    if isinstance(value, Tensor):
        return type(value), tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    if isinstance(value, fx.Node):
        assert number is not None
        return "node", number[value]
    if isinstance(value, tuple | list | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return type(value).__name__, tuple(_value(item, number) for item in items)
    if isinstance(value, dict):
        return "dict", tuple((_value(key), _value(item, number)) for key, item in value.items())
    if isinstance(value, slice):
        return "slice", _value(value.start, number), _value(value.stop, number), _value(value.step, number)
    # 1, 1.0 and True are equal, and not the same to an operation.
    return (type(value), value) if isinstance(value, _PLAIN) else ("the", id(value))

"""Fingerprint of a layer: an equality key of layers that compute the same, so that measurements of one hold for the others.

Two layers have equal fingerprints when their graphs have the same operations in the same order, on modules of the same types, with the
same settings and with tensors of the same shapes, and their modules have the same modes. A setting that is a block's number in the list
that it stands in (`layer_idx`) may differ, where both did the same operations while their model was captured. Settings that are no plain
values are compared by identity: functions and classes that their module names, which last, and any other object (a lambda, an object of
the user's).
"""

from collections.abc import Hashable

from torch import fx

from lowmem_pnn.capture.equal_blocks import Identity, module_key, value_key
from lowmem_pnn.model.layer import Layer


def lasts(key: Hashable) -> bool:
    """Decide whether a key that holds fingerprints is valid without the layers that these were made of.

    Args:
        key: tuples of plain values and of what `layer_fingerprint` returned.
    """
    if isinstance(key, tuple):
        return all(map(lasts, key))
    return not isinstance(key, Identity)


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
            target: Hashable = module_key(module.get_submodule(str(node.target)), places)
        elif node.op == "get_attr":
            path, _, attribute = str(node.target).rpartition(".")
            target = value_key(getattr(module.get_submodule(path), attribute))
        elif node.op == "placeholder":
            target = None
        else:
            target = node.target if isinstance(node.target, str) else value_key(node.target)
        steps.append((node.op, target, value_key((node.args, dict(node.kwargs)), numbers)))
    # One tensor under two names, inside a layer.
    tensors = [*layer.parameters().values(), *layer.buffers().values()]
    first_index: dict[int, int] = {}
    ties = tuple(first_index.setdefault(id(tensor), index) for index, tensor in enumerate(tensors))
    head = None if layer.head is None else module_key(layer.head)
    modes = value_key((layer.modes.in_train, layer.modes.in_eval, layer.kept))
    return tuple(steps), tuple(map(value_key, tensors)), ties, head, modes, layer.precision, layer.operations

"""Layouts: the axis of a boundary's tensor that its features lie on, told by the modules with weights that made it."""

import dataclasses
from collections.abc import Sequence

from torch import fx, nn

from lowmem_pnn.model.call_form import TensorSpec
from lowmem_pnn.model.layer import Layer, is_of_head

# The attributes that say how many features a module takes, and gives; and the axis of a sample that they lie on.
_KINDS: tuple[tuple[type[nn.Module], int, str, str], ...] = (
    (nn.modules.conv._ConvNd, 0, "in_channels", "out_channels"),
    (nn.modules.batchnorm._NormBase, 0, "num_features", "num_features"),
    (nn.GroupNorm, 0, "num_channels", "num_channels"),
    (nn.Linear, -1, "in_features", "out_features"),
    (nn.LayerNorm, -1, "normalized_shape", "normalized_shape"),
    (nn.RMSNorm, -1, "normalized_shape", "normalized_shape"),
    (nn.Embedding, -1, "embedding_dim", "embedding_dim"),
    (nn.MultiheadAttention, -1, "embed_dim", "embed_dim"),
    (nn.RNNBase, -1, "input_size", "hidden_size"),
)


def with_features(spec: TensorSpec, layers: Sequence[Layer], position: int) -> TensorSpec:
    """Return a boundary's tensor with the axis of its features, where the modules that made it tell.

    A convolution, or a norm of channels, says that the first axis has the features, a linear layer or a LayerNorm that the last one has;
    what speaks is the last such module before the boundary that gives as many features as an axis is long. Where both axes are, and
    modules of both kinds took part, nobody knows.

    Args:
        spec: tensor at the boundary after the last of these layers.
        layers: layers from the model's first on.
        position: number of the tensor in its boundary.
    """
    if len(spec.shape) < 2:
        return spec
    modules = _modules_before(layers, position)
    return _told(spec, [told for module in modules if (told := _told_by(module)) is not None])


def with_features_of_samples(spec: TensorSpec, layers: Sequence[Layer]) -> TensorSpec:
    """Return the form of samples with the axis of their features, where the first module with weights that takes them tells.

    Args:
        spec: the only tensor before the first layer.
        layers: layers of the model.
    """
    modules = (module for layer in layers for name, module in layer.module.named_modules() if not is_of_head(f"{name}."))
    first = next((told for module in modules if (told := _told_by(module, takes=True)) is not None), None)
    return spec if len(spec.shape) < 2 or first is None else _told(spec, [first])


def _told(spec: TensorSpec, found: Sequence[tuple[int, int]]) -> TensorSpec:
    """Return a tensor with the axis of its features, by the axes and numbers that modules tell, the nearest module last."""
    for axis, size in reversed(found):
        fits = [end for end in (0, -1) if spec.shape[end] == size]
        if len(fits) == 2:
            return dataclasses.replace(spec, features=axis) if all(other == axis for other, _ in found) else spec
        # What a convolution gave may have been turned to tokens, or to (H, W, C), since, and what a linear layer gave to (C, H, W). But of
        # two axes a linear layer that fits the first one was over positions, as in an MLP mixer, and was turned back.
        if fits and (axis in fits or axis == 0 or len(spec.shape) > 2):
            return dataclasses.replace(spec, features=fits[0])
    return spec


def _told_by(module: nn.Module, *, takes: bool = False) -> tuple[int, int] | None:
    """Return the axis and the number of features that a module gives, or takes; None where it does not tell."""
    for kind, axis, taken, given in _KINDS:
        if isinstance(module, kind):
            size = getattr(module, taken if takes else given)
            if isinstance(size, tuple | list):
                return (axis, size[0]) if len(size) == 1 else None
            return axis, size
    return None


def _modules_before(layers: Sequence[Layer], position: int) -> list[nn.Module]:
    """Return the modules of the last layer that made a tensor, in the order in which they run, or of the last before it that has any."""
    for layer in reversed(layers):
        module = layer.module
        if not isinstance(module, fx.GraphModule):
            return [one for name, one in module.named_modules() if not is_of_head(f"{name}.")]
        nodes = list(module.graph.nodes)
        returned = nodes[-1].args[0]
        last = returned[position] if isinstance(returned, tuple | list) else returned
        behind = _ancestors(last)
        made = [
            one
            for node in nodes
            if node in behind and node.op == "call_module"
            for one in module.get_submodule(str(node.target)).modules()
        ]
        if any(_told_by(one) is not None for one in made):
            return made
        inputs = [node for node in nodes if node.op == "placeholder"]
        passed = [number for number, node in enumerate(inputs) if node in behind]
        if not passed:
            return []
        position = passed[0]
    return []


def _ancestors(node: object) -> set[fx.Node]:
    """Return a node, and all that it is computed of."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, fx.Node) and one not in found:
            found.add(one)
            waiting.extend(one.all_input_nodes)
    return found

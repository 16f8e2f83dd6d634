"""The chain: a model as an ordered list of layers, cut wherever a graph of its forward allows it.

    capture:  model --trace--> graph --shapes of two batch sizes, both modes--> cuts --> layers

A *boundary* is the set of values that flow from one layer to the next: computed before a cut and used after it. A cut stands before
an operation with weights that is no normalisation and no activation, and only where every value of its boundary is a tensor with the
batch on axis 0, and no later operation changes one of them in place.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from lowmem_pnn.errors import CaptureError, ConfigError
from lowmem_pnn.model.dataflow import DataFlow
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.model.precision import FULL_PRECISION, Precision
from lowmem_pnn.model.tracer import trace

# Attributes that a GraphModule has and a plain module has not: a submodule of such a name would be lost.
_GRAPH_MODULE_NAMES = {*dir(fx.GraphModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module())}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one tensor of a boundary."""

    shape: tuple[int, ...]
    """Shape of one sample: without the batch axis, which is always axis 0."""

    dtype: torch.dtype
    """Type that the layers return and take."""

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample.

        Example:
            >>> TensorSpec((3, 32, 32), torch.float32).sample_bytes
            12288
        """
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, eq=False)
class Chain:
    """A model as an ordered list of layers: `chain(x)` equals `model(x)`, in train and eval mode, at any batch size.

    Its modules are its own; they hold the model's very tensors until `Layer.set_tensor` replaces them.
    """

    layers: tuple[Layer, ...]
    """Layers in the order of computing."""

    boundaries: tuple[tuple[TensorSpec, ...], ...]
    """`boundaries[k]` flows into layer k, `boundaries[k + 1]` out of it; the first and the last are one tensor each."""

    ties: tuple[tuple[str, ...], ...]
    """Groups of names, in `state_dict` order, that are one and the same tensor."""

    tied_ranges: tuple[tuple[int, int], ...]
    """Pairs (first, last) of layers that use one tensor, first < last: no partition may start at first + 1 to last."""

    unused: tuple[str, ...]
    """Frozen parameters, and buffers, that no layer holds under any name."""

    persistent: tuple[str, ...]
    """Keys of the model's `state_dict`, in its order."""

    def __call__(self, x: Tensor) -> Tensor:
        """Run all layers.

        Args:
            x: samples, (batch, *sample), as `boundaries[0]` says.

        Returns:
            Outputs, (batch, *output).
        """
        tensors: tuple[Tensor, ...] = (x,)
        for layer in self.layers:
            tensors = layer(*tensors)
        return tensors[0]

    @cached_property
    def owners(self) -> dict[str, str]:
        """For each name of a tied tensor, the one of its names that it is stored under."""
        return {alias: group[0] for group in self.ties for alias in group}

    def owner_of(self, name: str) -> str:
        """Return the name under which a tensor is stored: the first of its names, where it is tied.

        Args:
            name: any name of a tensor in the model's `state_dict`, or of an auxiliary head's.
        """
        return self.owners.get(name, name)

    def train(self, mode: bool = True) -> "Chain":
        """Put all layers in train mode, or in eval mode, and return the chain."""
        for layer in self.layers:
            layer.module.train(mode)
        return self

    def eval(self) -> "Chain":
        """Put all layers in eval mode, and return the chain."""
        return self.train(False)

    def layer_index(self, cut: str | int) -> int:
        """Find the layer before which a cut is to stand.

        Args:
            cut: number of a layer, from 0, as int or text; its name; or the name of a module, for the first layer of that module.
                Digits are always a number, also where a layer has such a name.

        Returns:
            The number of the layer.

        Raises:
            ConfigError: there is no such layer.
        """
        names = [layer.name for layer in self.layers]
        if isinstance(cut, int) or re.fullmatch(r"-?[0-9]+", cut):
            if 0 <= int(cut) < len(names):
                return int(cut)
            raise ConfigError(
                f"no layer {cut}: the layers are numbered from 0 ({names[0]!r}) to {len(names) - 1} ({names[-1]!r})"
            )
        if cut in names:
            return names.index(cut)
        for index, name in enumerate(names):
            if name.startswith(f"{cut}."):
                return index
        for index, layer in enumerate(self.layers):
            if any(cut == name for name, _ in layer.module.named_modules()):
                raise ConfigError(
                    f"no cut can stand at {cut!r}: it is inside layer {index}, {layer.name!r}; cut at a layer's name or number"
                )
        prefixes = {name.rsplit(".", count)[0] for name in names for count in range(name.count(".") + 1)}
        close = difflib.get_close_matches(cut, sorted(prefixes), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the layers are {', '.join(names[:20])}{', ...' * (len(names) > 20)}"
        raise ConfigError(f"no layer {cut!r} in the model; {hint}")


def capture(model: nn.Module, input_spec: TensorSpec, precision: Precision = FULL_PRECISION) -> Chain:
    """Cut a model into layers.

    Its weights are never read, so that the model may be on the meta device, or larger than memory. The model, its mode, its gradients
    and the random generators stay as they are.

    Args:
        model: module for which `model(x)` returns one tensor, with the batch on axis 0 as in x.
        input_spec: shape and type of x, (batch, *input_spec.shape).
        precision: compute precision and memory format of the layers.

    Returns:
        The chain, whose modules are in the mode of `model`.

    Raises:
        CaptureError: torch.fx cannot trace the model's own forward, the model does not take such samples or does not return one
            tensor of the same batch, or the output does not depend on a trainable parameter.

    Example:
        >>> chain = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), TensorSpec((4,), torch.float32))
        >>> [layer.name for layer in chain.layers], [str(specs[0]) for specs in chain.boundaries]
        (['0', '1'], ['(4,) float32', '(3,) float32', '(2,) float32'])
    """
    names = _tensors_by_name(model)
    _check_weights(model, names)
    flow = DataFlow(model, trace(model), input_spec.shape, input_spec.dtype, precision)
    # A module of an nn.Sequential is called '4': its layer is named by the layer's own number, so that no layer has the number of
    # another one for a name.
    named = ((str(number) if name.isdigit() else name, module) for number, (name, module) in enumerate(flow.layers()))
    layers = [Layer(name, module, names, precision) for name, module in named]
    held: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        for tensor in {**layer.parameters(), **layer.buffers()}.values():
            held.setdefault(id(tensor), []).append(index)
    trained = flow.trained()
    for name, tensor in names.items():
        if tensor.requires_grad and (id(tensor) not in held or id(tensor) not in trained):
            raise CaptureError(
                f"parameter {name!r} of {type(model).__name__} gets no gradient: its output does not depend on it; freeze it "
                "(requires_grad_(False)) or remove it"
            )
    groups: dict[int, list[str]] = {}
    for name, tensor in names.items():
        groups.setdefault(id(tensor), []).append(name)
    return Chain(
        layers=tuple(layers),
        boundaries=tuple(tuple(TensorSpec(*spec) for spec in specs) for specs in flow.boundaries()),
        ties=tuple(tuple(group) for group in groups.values() if len(group) > 1),
        tied_ranges=tuple(sorted({(users[0], users[-1]) for users in held.values() if users[0] < users[-1]})),
        unused=tuple(name for name, tensor in names.items() if id(tensor) not in held),
        persistent=tuple(model.state_dict(keep_vars=True)),
    )


def _tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, under every name: those of the `state_dict` in its order, then the others."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    persistent = list(model.state_dict(keep_vars=True))
    for name in persistent:
        if name not in tensors:
            raise CaptureError(
                f"the state_dict of {type(model).__name__} holds {name!r}, which is no parameter or buffer of that name; such "
                "state cannot be trained or saved here, remove it"
            )
    return {name: tensors[name] for name in [*persistent, *(name for name in tensors if name not in set(persistent))]}


def _check_weights(model: nn.Module, names: Mapping[str, Tensor]) -> None:
    for name, tensor in names.items():
        if torch.nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"{name!r} of {type(model).__name__} has no shape yet; run the model once on one sample before it is captured"
            )
        if name.split(".")[0] in _GRAPH_MODULE_NAMES:
            raise CaptureError(
                f"{type(model).__name__} has an attribute {name.split('.')[0]!r}, which torch.fx keeps for itself; rename it"
            )
    # Two tensors over one memory, as `b.weight.data = a.weight.data` makes them, would part as soon as one of them is moved.
    spans: dict[int, list[tuple[int, int, str, Tensor]]] = {}
    for name, tensor in names.items():
        if tensor.numel() and tensor.layout == torch.strided:
            first = int(tensor.storage_offset()) * tensor.itemsize
            reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            last = first + tensor.itemsize * (1 + int(reach))
            spans.setdefault(tensor.untyped_storage()._cdata, []).append((first, last, name, tensor))
    for shared in spans.values():
        shared.sort(key=lambda span: span[:2])
        for (_, end, name, tensor), (start, _, other_name, other) in pairwise(shared):
            if start < end and other is not tensor and (tensor.requires_grad or other.requires_grad):
                raise CaptureError(
                    f"{name!r} and {other_name!r} of {type(model).__name__} are two tensors over one memory; make them one, "
                    "as by `b.weight = a.weight`"
                )

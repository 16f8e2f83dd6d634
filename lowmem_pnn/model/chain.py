"""The chain: a model as an ordered list of layers, cut wherever a graph of its forward allows it.

    capture:  model --trace--> graph --shapes of two batch sizes, both modes--> cuts --> layers

A *boundary* is what flows from one layer to the next: the values that are computed before a cut and used after it. A cut stands
before an operation with weights that is no normalisation and no activation, and only where every value that crosses it is a
tensor with the batch on axis 0, and no later operation changes one of them in place.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from lowmem_pnn.errors import CaptureError, ConfigError
from lowmem_pnn.model.dataflow import DataFlow
from lowmem_pnn.model.precision import AS_IT_IS, Precision
from lowmem_pnn.model.tracer import trace

# Names that a GraphModule has and a plain module has not: a submodule of such a name would be lost.
_TAKEN = {*dir(fx.GraphModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module())}


def head_prefix(number: int) -> str:
    """What the names of a head's weights begin with, where its layer has this number."""
    return f"auxiliary_heads.{number}."


def is_of_head(name: str) -> bool:
    """Whether a name is that of an auxiliary head's tensor."""
    return name.startswith(head_prefix(0).partition(".")[0] + ".")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one tensor of a boundary."""

    shape: tuple[int, ...]
    """Of one sample: without the batch axis, which is always axis 0."""

    dtype: torch.dtype
    """As the layers give and take it."""

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


class Compiled(Protocol):
    """Code in the place of a layer's forward."""

    def __call__(self, trains: bool, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Run it on a layer's tensors and inputs; None where there is no code for such inputs."""
        ...

    def rehearsing(self) -> AbstractContextManager[None]:
        """Where it can be given fake tensors."""
        ...


class Layer:
    """The smallest piece of a model that can be cut off.

    Args:
        name: as in `Layer.name`.
        module: as in `Layer.module`.
        order: names of all the model's parameters and buffers.
        precision: as in `Layer.precision`.
    """

    name: str
    """Qualified name of its first module or parameter with weights ('layer1.0', 'fc'), or, where that is a number, the layer's own
    number from 0; unique in a chain."""

    module: nn.Module
    """An `fx.GraphModule` whose parameters and buffers have the names they have in the model."""

    precision: Precision
    """How it computes, and its head too."""

    def __init__(self, name: str, module: nn.Module, order: Iterable[str], precision: Precision = AS_IT_IS) -> None:
        self.name, self.module, self.precision = name, module, precision
        parameters = dict(module.named_parameters(remove_duplicate=False))
        buffers = dict(module.named_buffers(remove_duplicate=False))
        self._parameter_names = tuple(key for key in order if key in parameters)
        self._buffer_names = tuple(key for key in order if key in buffers)
        assert len(self._parameter_names) == len(parameters)
        assert len(self._buffer_names) == len(buffers)

    compiled: Compiled | None = None
    """Code that is run instead of the module where it applies; the head is run as it is."""

    head: nn.Module | None = None
    """What gives class scores from its outputs: an auxiliary head; its weights are among the layer's."""

    def with_head(self, head: nn.Module, number: int) -> "Layer":
        """The layer, with a head whose weights are called `auxiliary_heads.NUMBER....`; running the layer does not run it.

        Args:
            head: a module of its own.
            number: the layer's.
        """
        prefix = head_prefix(number)
        container, _, own = prefix.rstrip(".").rpartition(".")
        self.module.add_module(container, nn.Module())
        self.module.get_submodule(container).add_module(own, head)
        names = [*head.state_dict(keep_vars=True), *dict(head.named_buffers())]
        order = [*self._parameter_names, *self._buffer_names, *dict.fromkeys(prefix + name for name in names)]
        layer = Layer(self.name, self.module, order, self.precision)
        layer.head = head
        return layer

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run it, from the boundary before it to the one after it; what it does not use goes through as it is."""
        if self.compiled is not None:
            made = self.compiled(self.module.training, {**self.parameters(), **self.buffers()}, tensors)
            if made is not None:
                return made
        with self.precision.computing():
            # Not module(...): a GraphModule prints to stderr before it raises, and running out of memory is no news here.
            result: tuple[Tensor, ...] = self.module.forward(*self.precision.laid_out(tensors))
        return result

    def scores(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What a loss of the layer's own is measured on: its head's class scores of its outputs; or these, where it has no head."""
        if self.head is None:
            return outputs
        with self.precision.computing():
            return (self.head(outputs[0]),)

    def run_on(self, tensors: Mapping[str, Tensor], *inputs: Tensor, scores: bool = False) -> tuple[Tensor, ...]:
        """Run it on other parameters and buffers than its own, which are not looked at.

        Args:
            tensors: by name, all of them, the head's too; buffers may be changed.
            inputs: the boundary before it.
            scores: give `scores` of the outputs instead of these.
        """
        with self.precision.computing():
            outputs = torch.func.functional_call(self.module, dict(tensors), self.precision.laid_out(inputs), tie_weights=False)
        return self.scores_on(tensors, tuple(outputs)) if scores else tuple(outputs)

    def scores_on(self, tensors: Mapping[str, Tensor], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`scores`, with other parameters and buffers than its own.

        Args:
            tensors: by name, as in `run_on`.
            outputs: of the layer.
        """
        if self.head is None:
            return outputs
        prefix = next(name for name, module in self.module.named_modules() if module is self.head) + "."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        with self.precision.computing():
            return (torch.func.functional_call(self.head, own, outputs, tie_weights=False),)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name in `state_dict` order; one that has several names in this layer is there under each."""
        return {name: self.module.get_parameter(name) for name in self._parameter_names}

    def buffers(self) -> dict[str, Tensor]:
        """Buffers by name, those that are not in the `state_dict` too."""
        return {name: self.module.get_buffer(name) for name in self._buffer_names}

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Replace a parameter or buffer of this layer.

        Args:
            name: one of `parameters()` or `buffers()`. Its ties are the caller's business.
            tensor: a parameter is taken as it is; where `name` is one, another tensor becomes one that requires a gradient if the
                one before it did.

        Raises:
            KeyError: the layer has nothing of that name.
        """
        path, _, attribute = name.rpartition(".")
        if name in self._parameter_names:
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, self.module.get_parameter(name).requires_grad)
        elif name not in self._buffer_names:
            raise KeyError(f"layer {self.name!r} has no parameter or buffer {name!r}")
        # By setattr, for modules that keep a list of their weights beside it, as nn.LSTM does.
        setattr(self.module.get_submodule(path), attribute, tensor)

    def __repr__(self) -> str:
        return f"Layer({self.name!r})"


@dataclass(frozen=True, eq=False)
class Chain:
    """A model as an ordered list of layers: `chain(x)` equals `model(x)`, in train and eval mode, at any batch size.

    It has modules of its own, which hold the model's very tensors until `Layer.set_tensor` replaces them.
    """

    layers: tuple[Layer, ...]
    """In the order of computing."""

    boundaries: tuple[tuple[TensorSpec, ...], ...]
    """`boundaries[k]` flows into layer k, `boundaries[k + 1]` out of it; the first and the last are one tensor each."""

    ties: tuple[tuple[str, ...], ...]
    """Groups of names, in `state_dict` order, that are one and the same tensor."""

    tied_ranges: tuple[tuple[int, int], ...]
    """(first, last) layer that use one tensor, first < last: no partition may start at first + 1 to last."""

    unused: tuple[str, ...]
    """Frozen parameters, and buffers, that no layer holds under any name."""

    persistent: tuple[str, ...]
    """Keys of the model's `state_dict`, in its order."""

    def __call__(self, x: Tensor) -> Tensor:
        """Run all layers.

        Args:
            x: (batch, *sample), as `boundaries[0]` says.

        Returns:
            (batch, *output).
        """
        tensors: tuple[Tensor, ...] = (x,)
        for layer in self.layers:
            tensors = layer(*tensors)
        return tensors[0]

    def train(self, mode: bool = True) -> "Chain":
        """Put all layers in train mode, or in eval mode, and return the chain."""
        for layer in self.layers:
            layer.module.train(mode)
        return self

    def eval(self) -> "Chain":
        """Put all layers in eval mode, and return the chain."""
        return self.train(False)

    def layer_index(self, cut: str | int) -> int:
        """Find the layer that a cut is to stand before.

        Args:
            cut: the number of a layer, from 0, as int or text; the name of one; or the name of a module whose first layer is
                meant. Digits are always a number, also where a layer has such a name.

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


def capture(model: nn.Module, input_spec: TensorSpec, precision: Precision = AS_IT_IS) -> Chain:
    """Cut a model into layers.

    Its weights are never read, so that it may be on the meta device, or larger than memory. The model, its mode, its gradients
    and the random generators stay as they are.

    Args:
        model: `model(x)` gives one tensor, with the batch on axis 0 as in x.
        input_spec: of x, (batch, *input_spec.shape).
        precision: how its layers are to compute.

    Returns:
        The chain, whose modules are in the mode of `model`.

    Raises:
        CaptureError: torch.fx cannot trace the model's own forward, the model does not take such samples or does not return one
            tensor of the same batch, or a trainable parameter has no part in that.

    Example:
        >>> chain = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), TensorSpec((4,), torch.float32))
        >>> [layer.name for layer in chain.layers], [str(specs[0]) for specs in chain.boundaries]
        (['0', '1'], ['(4,) float32', '(3,) float32', '(2,) float32'])
    """
    names = _tensors_by_name(model)
    _check_weights(model, names)
    flow = DataFlow(model, trace(model), input_spec.shape, input_spec.dtype, precision)
    # A module of an nn.Sequential is called '4'; so that no layer has another one's number for a name, its name is its own number.
    pieces = ((str(number) if name.isdigit() else name, module) for number, (name, module) in enumerate(flow.pieces()))
    layers = [Layer(name, module, names, precision) for name, module in pieces]
    held: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        for tensor in {**layer.parameters(), **layer.buffers()}.values():
            held.setdefault(id(tensor), []).append(index)
    alive = flow.trained()
    for name, tensor in names.items():
        if tensor.requires_grad and (id(tensor) not in held or id(tensor) not in alive):
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
    """All parameters and buffers, under every name: those of the `state_dict` in its order, then the others."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    persistent = list(model.state_dict(keep_vars=True))
    for name in persistent:
        if name not in found:
            raise CaptureError(
                f"the state_dict of {type(model).__name__} holds {name!r}, which is no parameter or buffer of that name; such "
                "state cannot be trained or saved here, remove it"
            )
    return {name: found[name] for name in [*persistent, *(name for name in found if name not in set(persistent))]}


def _check_weights(model: nn.Module, names: Mapping[str, Tensor]) -> None:
    for name, tensor in names.items():
        if torch.nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"{name!r} of {type(model).__name__} has no shape yet; run the model once on one sample before it is captured"
            )
        if name.split(".")[0] in _TAKEN:
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


def works_by_rows(layer: Layer) -> bool:
    """Whether a layer treats all rows alike, whichever axes they are on: it is one `nn.Linear` over the last axis."""
    module = layer.module
    assert isinstance(module, fx.GraphModule)
    work = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    if len(work) != 1:
        return False
    if work[0].op == "call_module":
        return type(module.get_submodule(str(work[0].target))) is nn.Linear
    return bool(work[0].target is nn.functional.linear)


def has_one_backward(layers: Sequence[Layer], *, in_chunks: bool) -> list[bool]:
    """For each layer, whether its gradients are its own alone, and whole after one backward: what plans may count on.

    Args:
        layers: of a chain; whichever partitions they come into.
        in_chunks: the last layer goes back chunk by chunk.
    """
    users: dict[int, set[int]] = {}
    tensors: list[list[Tensor]] = [list(layer.parameters().values()) for layer in layers]
    for number, own in enumerate(tensors):
        for tensor in own:
            users.setdefault(id(tensor), set()).add(number)
    last = len(layers) - 1 if in_chunks else None
    return [number != last and all(users[id(tensor)] == {number} for tensor in own) for number, own in enumerate(tensors)]

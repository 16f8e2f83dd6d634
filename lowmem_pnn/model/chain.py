"""The chain: a model as an ordered list of layers, cut wherever a graph of its forward allows it.

    capture:  model --trace--> graph --shapes of two batch sizes, both modes--> cuts --> layers

A *boundary* is the set of values that flow from one layer to the next: computed before a cut and used after it. A cut stands before
an operation with weights that is no normalisation and no activation, and only where every value of its boundary is a tensor with the
batch on axis 0, and no later operation changes one of them in place.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowmem_pnn.errors import CaptureError, ConfigError
from lowmem_pnn.model.call_form import ONE_TENSOR, CallForm, OutputForm
from lowmem_pnn.model.call_form import TensorSpec as TensorSpec
from lowmem_pnn.model.copies import copy_structure, without_cache
from lowmem_pnn.model.dataflow import trace_and_flow
from lowmem_pnn.model.dispatch_modes import KnownWrittenError
from lowmem_pnn.model.equal_blocks import look_again
from lowmem_pnn.model.fake_model import ModelRun, Setting, run_model, uses_checkpointing
from lowmem_pnn.model.layer import Layer, python_state_of, set_python_state
from lowmem_pnn.model.modes import read_modes
from lowmem_pnn.model.opening import LARGE_SHARE, weight_bytes
from lowmem_pnn.model.parameter_hooks import ParameterHooks
from lowmem_pnn.model.precision import FULL_PRECISION, Precision
from lowmem_pnn.model.python_state import Attribute
from lowmem_pnn.model.recomputed import unchanged_buffers
from lowmem_pnn.model.supported import check_model, check_overrides, tensors_by_name, versions_of


@dataclass(frozen=True, eq=False)
class Chain:
    """A model as an ordered list of layers: `chain(x)` equals `model(x)`, in train and eval mode, at any batch size.

    Its modules are its own; they hold the model's very tensors until `Layer.set_tensor` replaces them.
    """

    layers: tuple[Layer, ...]
    """Layers in the order of computing."""

    boundaries: tuple[tuple[TensorSpec, ...], ...]
    """`boundaries[k]` flows into layer k, `boundaries[k + 1]` out of it; the first are the model's inputs, the last what it returns."""

    ties: tuple[tuple[str, ...], ...]
    """Groups of names, in `state_dict` order, that are one and the same tensor."""

    tied_ranges: tuple[tuple[int, int], ...]
    """Pairs (first, last) of layers that use one tensor, first < last: no partition may start at first + 1 to last. Buffers that no
    forward changes do not count: each layer has its own."""

    unused: tuple[str, ...]
    """Frozen parameters, and buffers, that no layer holds under any name."""

    persistent: tuple[str, ...]
    """Keys of the model's `state_dict`, in its order."""

    written: frozenset[str] = frozenset()
    """Parameters that a forward changes in place, under every name."""

    idle: tuple[str, ...] = ()
    """Parameters that would learn, and get no gradient since the output does not depend on them: they are frozen here."""

    output_form: OutputForm | None = None
    """What the model returns beside its tensors, where it does not return one tensor as it is."""

    call_form: CallForm = ONE_TENSOR
    """How the tensors of a batch are handed to the model."""

    between_blocks: "Chain | None" = None
    """The same layers, but those that are parts of one block and hand on several tensors joined; None where there are no such. It shares
    its modules with this chain."""

    versions: str = ""
    """Metadata of the model's `state_dict`, as JSON, where the model cannot be loaded without it."""

    def __call__(self, *inputs: Tensor) -> Any:
        """Run all layers.

        Args:
            inputs: samples, (batch, *sample) each, as `boundaries[0]` says.

        Returns:
            What the model returns.
        """
        tensors: tuple[Tensor, ...] = inputs
        for layer in self.layers:
            tensors = layer(*tensors)
        return self.rebuild(tensors)

    def rebuild(self, outputs: tuple[Tensor, ...]) -> Any:
        """Return what the model returns with some outputs: a tensor, or a tuple, dict or dataclass of tensors.

        Args:
            outputs: tensors as the last layer returns them, `boundaries[-1]`.
        """
        return outputs[0] if self.output_form is None else self.output_form.build(outputs)

    @cached_property
    def owners(self) -> dict[str, str]:
        """For each name of a tied tensor, the one of its names that it is stored under."""
        return {alias: group[0] for group in self.ties for alias in group}

    @property
    def num_objects(self) -> int:
        """Number of modules and operations of all layers: what the chain takes in memory beside its tensors goes by it."""
        graphs = (layer.module.graph.nodes for layer in self.layers if isinstance(layer.module, fx.GraphModule))
        return sum(map(len, graphs)) + sum(1 for layer in self.layers for _ in layer.module.modules())

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of all layers, with their names in the model."""
        return (named for layer in self.layers for named in layer.module.named_modules(remove_duplicate=False))

    @cached_property
    def _hooks(self) -> dict[str, ParameterHooks]:
        """What hangs on parameters, by the names under which they are stored."""
        return {self.owner_of(name): hooks for layer in self.layers for name, hooks in layer.hooks.items()}

    def owner_of(self, name: str) -> str:
        """Return the name under which a tensor is stored: the first of its names, where it is tied.

        Args:
            name: any name of a tensor in the model's `state_dict`, or of an auxiliary head's.
        """
        return self.owners.get(name, name)

    @property
    def python_state(self) -> dict[str, Any]:
        """Python attributes that a forward changes and the next one reads, by module and attribute; empty for nearly all models."""
        return python_state_of(self.layers)

    def set_python_state(self, state: Mapping[str, Any]) -> None:
        """Set these attributes to copies of what `python_state` returned."""
        set_python_state(self.layers, state)

    @contextmanager
    def python_state_restored(self) -> Iterator[None]:
        """Restore at the end of the context what forwards change in Python attributes of modules."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.python_state_restored())
            yield

    def hang_hooks(self, name: str, parameter: nn.Parameter) -> None:
        """Hang on a parameter what hangs on the model's own.

        Args:
            name: the name under which it is stored.
            parameter: parameter that takes the place of the model's.
        """
        if name in self._hooks:
            self._hooks[name].hang_on(parameter)

    def has_hooks(self, name: str) -> bool:
        """Decide whether anything hangs on a parameter, which then sees its gradient."""
        return name in self._hooks

    def train(self, mode: bool = True) -> "Chain":
        """Put all layers in train mode, or in eval mode, and return the chain."""
        for layer in self.layers:
            layer.train(mode)
        return self

    def eval(self) -> "Chain":
        """Put all layers in eval mode, and return the chain."""
        return self.train(False)

    def drop_values(self) -> None:
        """Put tensors of the same shapes on torch's meta device in the place of the model's, where these have values."""
        twins: dict[int, Tensor] = {}
        layers = (*self.layers, *(self.between_blocks.layers if self.between_blocks is not None else ()))
        held = [(layer, name, tensor) for layer in layers for name, tensor in {**layer.parameters(), **layer.buffers()}.items()]
        for layer, name, tensor in held:
            if not tensor.is_meta:
                if id(tensor) not in twins:
                    twin = torch.empty_like(tensor, device="meta")
                    twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
                layer.set_tensor(name, twins[id(tensor)])

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


def capture(
    model: nn.Module,
    specs: TensorSpec | tuple[TensorSpec, ...],
    precision: Precision = FULL_PRECISION,
    call: CallForm | None = None,
    learns_from: tuple[str, ...] = (),
) -> Chain:
    """Cut a model into layers.

    Its weights are never read, so that the model may be on the meta device, or larger than memory. The model, its mode, its gradients
    and the random generators stay as they are.

    Args:
        model: module that returns a tensor, or a tuple, dict or dataclass of tensors, with the batch on axis 0 as in its inputs.
        specs: shape and type of each input, (batch, *spec.shape).
        precision: compute precision and memory format of the layers.
        call: how several inputs are handed to the model; by default by position.
        learns_from: names of outputs, the first of which that there is the loss is taken of; empty where it takes what it wants. What no
            gradient comes to is kept as it is.

    Returns:
        The chain, whose modules are in the mode of `model`.

    Raises:
        CaptureError: torch.fx cannot trace the model's own forward, the model does not take such samples or does not return tensors of
            the same batch, or its output does not depend on any parameter that learns.

    Example:
        >>> chain = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), TensorSpec((4,), torch.float32))
        >>> [layer.name for layer in chain.layers], [str(specs[0]) for specs in chain.boundaries]
        (['0', '1'], ['(4,) float32', '(3,) float32', '(2,) float32'])
    """
    names = tensors_by_name(model)
    check_model(model, names)
    model = without_cache(model)
    modes = read_modes(model)
    if modes.frozen:
        model = _with_frozen(model, names, modes.frozen)
        names = tensors_by_name(model)
    look_again(model)
    specs = specs if isinstance(specs, tuple) else (specs,)
    setting = Setting(specs, precision, 2, True, call or CallForm.positional(len(specs)), learns_from)
    try:
        runs = _runs(model, setting)
    except KnownWrittenError:
        setting = replace(setting, values=False)
        runs = _runs(model, setting)
    changed = zip(*((run.kept, run.left, run.cached) for run in runs), strict=True)
    kept, left, cached = (frozenset[Attribute]().union(*sets) for sets in changed)
    try:
        closed = {
            name: f"its forward changes its attribute {attribute!r}, whose value a trace would freeze"
            for name, attribute in kept | cached
        }
        closed |= {
            name: "it has a hook on its backward, which begins and ends with the whole of it"
            for name, module in model.named_modules()
            if module._backward_hooks or module._backward_pre_hooks
        }
        traced, flow = trace_and_flow(model, setting, runs, closed)
        check_overrides(model, traced.opened)
    except CaptureError as error:
        if uses_checkpointing(model, setting):
            raise CaptureError(
                f"model {type(model).__name__} uses activation checkpointing (torch.utils.checkpoint) in its forward; turn it off: it is not "
                "needed here, where activations are kept to the budget anyway"
            ) from error
        raise
    reached = frozenset[str]().union(*(run.reached for run in runs))
    idle = tuple(name for name, tensor in names.items() if tensor.requires_grad and name not in reached)
    if idle and all(name in idle for name, tensor in names.items() if tensor.requires_grad):
        raise CaptureError(
            f"no parameter of {type(model).__name__} gets a gradient: its output depends on none that learns; see to its forward"
        )
    hooks = {
        name: found
        for name, tensor in names.items()
        if tensor.requires_grad and name not in idle and (found := ParameterHooks.of(tensor))
    }
    free = unchanged_buffers(model, runs)
    frozen = {id(names[name]): nn.Parameter(names[name].detach(), False) for name in idle}

    def cut(cuts: Sequence[int]) -> Chain:
        # A module of an nn.Sequential is called '4': its layer is named by the layer's own number, so that no layer has the number of
        # another one for a name.
        layers = []
        for number, (name, module, operations) in enumerate(flow.layers(cuts)):
            layers.append(Layer(str(number) if name.isdigit() else name, module, names, precision))
            layers[-1].operations = operations
        held: dict[int, list[int]] = {}
        for index, layer in enumerate(layers):
            inside = {name for name, _ in layer.module.named_modules(remove_duplicate=False)}
            layer.modes = modes.inside(inside)
            layer.kept = tuple(sorted(attribute for attribute in kept if attribute[0] in inside))
            layer.left = tuple(sorted(attribute for attribute in left if attribute[0] in inside and attribute[0]))
            layer.cached = tuple(sorted(attribute for attribute in cached if attribute[0] in inside and attribute[0]))
            layer.hooks = {name: hooks[name] for name in layer.parameters() if name in hooks}
            for name, tensor in {**layer.parameters(), **layer.buffers()}.items():
                held.setdefault(id(names[name]), []).append(index)
                if id(tensor) in frozen:
                    layer.set_tensor(name, frozen[id(tensor)])
        for name, found in hooks.items():
            if found.see_gradients and len(held[id(names[name])]) > 1:
                raise CaptureError(
                    f"parameter {name!r} of {type(model).__name__} has a hook on its gradient, and is used in "
                    f"{len(held[id(names[name])])} layers; its gradient is a sum of what these layers "
                    "give, which no hook sees here: scale or clip in the loss, or by --clip-norm"
                )
        groups: dict[int, list[str]] = {}
        for name, tensor in names.items():
            groups.setdefault(id(tensor), []).append(name)
        _say_what_is_whole(model, layers, traced.stopped)
        return Chain(
            layers=tuple(layers),
            boundaries=tuple(tuple(TensorSpec(*spec) for spec in boundary) for boundary in flow.boundaries(cuts)),
            ties=tuple(tuple(group) for group in groups.values() if len(group) > 1),
            tied_ranges=tuple(
                sorted({(users[0], users[-1]) for tensor, users in held.items() if users[0] < users[-1] and tensor not in free})
            ),
            unused=tuple(name for name, tensor in names.items() if id(tensor) not in held),
            persistent=tuple(model.state_dict(keep_vars=True)),
            written=frozenset().union(*(run.written for run in runs)),
            idle=idle,
            output_form=None if traced.output is None or traced.output.is_tensor else traced.output,
            call_form=setting.form,
            versions=versions_of(model),
        )

    coarse = flow.cuts_between_blocks()
    chain = cut(flow.cuts)
    return chain if coarse == flow.cuts else replace(chain, between_blocks=cut(coarse))


def _runs(model: nn.Module, setting: Setting) -> list[ModelRun]:
    """Run a model with two batch sizes, and in both modes."""
    return [run_model(model, replace(setting, batch=batch, training=mode)) for batch, mode in ((2, True), (3, True), (2, False))]


def _say_what_is_whole(model: nn.Module, layers: Iterable[Layer], stopped: Mapping[str, str]) -> None:
    """Note on layers that hold a large module which could not be opened why it is whole."""
    total = weight_bytes(model)
    for layer in layers:
        for name in stopped:
            inside = name and any(own == name and type(module) is not nn.Module for own, module in layer.module.named_modules())
            share = weight_bytes(model.get_submodule(name)) / max(1, total) if inside else 0.0
            if share > LARGE_SHARE:
                layer.whole = f"whole: {stopped[name]}; {share:.0%} of the weights"


def _with_frozen(model: nn.Module, names: Mapping[str, Tensor], frozen: Collection[str]) -> nn.Module:
    """Return a copy of a model over the same tensors, in which some parameters are frozen."""
    return copy_structure(model, {id(names[name]): nn.Parameter(names[name].detach(), False) for name in frozen})

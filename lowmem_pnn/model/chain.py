"""The chain: a model as an ordered list of layers, as it is captured (`lowmem_pnn.capture`).

A *boundary* is the set of values that flow from one layer to the next: computed before a cut and used after it.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.call_form import ONE_TENSOR, CallForm, OutputForm
from lowmem_pnn.model.call_form import TensorSpec as TensorSpec
from lowmem_pnn.model.layer import Layer, python_state_of, set_python_state
from lowmem_pnn.model.layout import with_features, with_features_of_samples
from lowmem_pnn.model.parameter_hooks import ParameterHooks


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
    """Parameters that a forward changes in place, under every name: those that learn, and averages of such."""

    moving: frozenset[str] = frozenset()
    """Parameters and buffers that a forward in train mode changes, under every name."""

    moving_ranges: tuple[tuple[int, int], ...] = ()
    """Those of `tied_ranges` whose tensor is such a one: every partition would change a copy of its own."""

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
    def laid_out(self) -> tuple[tuple[TensorSpec, ...], ...]:
        """The boundaries, with the axes of features, or channels, where the layers tell them."""
        samples = self.boundaries[0]
        return (
            (with_features_of_samples(samples[0], self.layers),) if len(samples) == 1 else samples,
            *(
                tuple(with_features(spec, self.layers[:number], position) for position, spec in enumerate(specs))
                for number, specs in enumerate(self.boundaries[1:], start=1)
            ),
        )

    @cached_property
    def owners(self) -> dict[str, str]:
        """For each name of a tied tensor, the one of its names that it is stored under."""
        return {alias: group[0] for group in self.ties for alias in group}

    @property
    def num_objects(self) -> int:
        """Number of modules and operations of all layers: what the chain takes in memory beside its tensors goes by it."""
        graphs = (layer.module.graph.nodes for layer in self.layers if isinstance(layer.module, fx.GraphModule))
        return sum(map(len, graphs)) + sum(1 for layer in self.layers for _ in layer.module.modules())

    def changing(self, layer: Layer) -> dict[str, Tensor]:
        """Return what forwards may change of the tensors of a layer: its buffers, and parameters that are written into, detached."""
        written = {name: one.detach() for name, one in layer.parameters().items() if name in self.written}
        return {**written, **layer.buffers()}

    @property
    def written_bytes(self) -> int:
        """Bytes of the parameters that learn and that a forward changes in place."""
        parameters = {self.owner_of(name): one for layer in self.layers for name, one in layer.parameters().items()}
        return sum(one.nbytes for name, one in parameters.items() if name in self.written and one.requires_grad)

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

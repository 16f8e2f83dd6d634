"""A layer: the smallest part of a model that can be cut off, with its tensors, its precision and its auxiliary head."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from lowmem_pnn.model.checkpointing import checkpointing_left_out
from lowmem_pnn.model.modes import Modes
from lowmem_pnn.model.parameter_hooks import MODULE_HOOKS, ParameterHooks
from lowmem_pnn.model.precision import FULL_PRECISION, Precision
from lowmem_pnn.model.python_state import Attribute, read_changed, read_state, state_restored, write_changed, write_state
from lowmem_pnn.quantization.stored_weights import is_stored_linear


def head_prefix(number: int) -> str:
    """Return the prefix of the weights' names of an auxiliary head.

    Args:
        number: number of the head's layer.
    """
    return f"auxiliary_heads.{number}."


def is_of_head(name: str) -> bool:
    """Decide whether a name is that of an auxiliary head's tensor."""
    return name.startswith(head_prefix(0).partition(".")[0] + ".")


CompiledOutputs = tuple[tuple[Tensor, ...], Mapping[str, Tensor]]
"""Tensors of the boundary after a layer, and buffers that the forward replaced, by name."""


class CompiledForward(Protocol):
    """A compiled function in the place of a layer's forward."""

    def __call__(self, trains: bool, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> CompiledOutputs | None:
        """Run the function on a layer's tensors and inputs; None where nothing was compiled for such inputs."""
        ...

    def accepting_fake_tensors(self) -> AbstractContextManager[None]:
        """Return a context in which the function may be given fake tensors."""
        ...


class Layer:
    """The smallest part of a model that can be cut off.

    Args:
        name: see `Layer.name`.
        module: see `Layer.module`.
        order: names of all the model's parameters and buffers.
        precision: see `Layer.precision`.
        averages: names of parameters that do not learn, and that a forward changes in place, as it does the weights of a teacher that are
            an average of the learner's: they are kept as buffers are.
    """

    name: str
    """Qualified name of its first module or parameter with weights ('layer1.0', 'fc'), or, where that is a number, the layer's own
    number from 0; unique in a chain."""

    module: nn.Module
    """An `fx.GraphModule` whose parameters and buffers have the names they have in the model; another one where the model is one layer."""

    precision: Precision
    """Compute precision and memory format of the layer and its head."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        order: Iterable[str],
        precision: Precision = FULL_PRECISION,
        averages: Collection[str] = (),
    ) -> None:
        self.name, self.module, self.precision = name, module, precision
        parameters = dict(module.named_parameters(remove_duplicate=False))
        buffers = dict(module.named_buffers(remove_duplicate=False))
        self._averages = parameters.keys() & averages
        buffers |= {key: parameters.pop(key) for key in self._averages}
        self._parameter_names = tuple(key for key in order if key in parameters)
        self._buffer_names = tuple(key for key in order if key in buffers)
        assert len(self._parameter_names) == len(parameters)
        assert len(self._buffer_names) == len(buffers)
        self._is_recurrent = any(isinstance(one, nn.RNNBase) for one in module.modules())

    modes: Modes = Modes()
    """Modes of the layer's modules, where they are others than asked for."""

    kept: tuple[Attribute, ...] = ()
    """Python attributes of the layer's modules that a forward changes and the next one reads."""

    plain: Mapping[Attribute, Any] = MappingProxyType({})
    """Attributes of plain values, with these, that no forward has changed yet, of modules that change others or go by values of their
    samples: a later forward may change these too."""

    left: tuple[Attribute, ...] = ()
    """Python attributes that a forward changes and no other one depends on."""

    cached: tuple[Attribute, ...] = ()
    """Those of them in which a forward keeps what it computed of weights: forgotten after every forward."""

    hooks: Mapping[str, ParameterHooks] = MappingProxyType({})
    """What hangs on parameters of the layer, by their names."""

    may_lack_gradient: frozenset[str] = frozenset()
    """Parameters that a forward may use or not, by values of its input."""

    detached: frozenset[str] = frozenset()
    """Parameters whose values a backward takes also for what they get no gradient by: they stay as they are until its end."""

    operations: str = ""
    """Hash of what the layer did to samples and weights while its model was captured; equal for layers that did the same."""

    whole: str = ""
    """Why a large module in it is whole, and how large it is: "whole: its forward ...; 63% of the weights"; else nothing."""

    checkpoints: bool = False
    """Whether the forward of its model calls `torch.utils.checkpoint`, which does nothing here: the plan says what is computed again."""

    compiled: CompiledForward | None = None
    """A function that runs instead of the module where it applies; the head always runs as a module."""

    head: nn.Module | None = None
    """The auxiliary head, which makes class scores from the layer's outputs; its weights are among the layer's."""

    def train(self, mode: bool = True) -> None:
        """Put the layer's modules into the mode in which the model's own `train()`, or `eval()`, puts them."""
        self.module.train(mode)
        for name, flag in self.modes.of(mode).items():
            self.module.get_submodule(name).training = flag

    def eval(self) -> None:
        """Put the layer's modules into eval mode."""
        self.train(False)

    @property
    def python_state(self) -> dict[str, Any]:
        """Values of the attributes in `kept`, by module and attribute, and of those in `plain` that have been changed."""
        return {**read_state(self.module, self.kept), **read_changed(self.module, self.plain)}

    def set_python_state(self, state: Mapping[str, Any]) -> None:
        """Set these attributes to copies of what `python_state` returned."""
        write_state(self.module, self.kept, state)
        write_changed(self.module, self.plain, state)

    def python_state_restored(self) -> AbstractContextManager[None]:
        """Return a context at whose end all that a forward changes in Python attributes is as before."""
        return state_restored(self.module, (*self.kept, *self.left, *self.plain))

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Give the context of a forward, at whose end is forgotten what it keeps of weights: they may be others the next time."""
        # As a frozen partition runs that gradients pass through.
        returns_in_eval_mode = self._is_recurrent and not self.module.training and torch.is_grad_enabled()
        with (
            self.precision.autocast(),
            state_restored(self.module, self.cached) if self.cached else nullcontext(),
            checkpointing_left_out() if self.checkpoints else nullcontext(),
            _without_cudnn() if returns_in_eval_mode else nullcontext(),
        ):
            yield

    def with_head(self, head: nn.Module, number: int) -> "Layer":
        """Return the layer with a head whose weights are called `auxiliary_heads.NUMBER....`; running the layer does not run the head.

        Args:
            head: module of the head.
            number: number of the layer.
        """
        prefix = head_prefix(number)
        container, _, own = prefix.rstrip(".").rpartition(".")
        # A copy, over the same modules: this layer stays without a head.
        module = copy.copy(self.module)
        module.add_module(container, nn.Module())
        module.get_submodule(container).add_module(own, head)
        names = [*head.state_dict(keep_vars=True), *dict(head.named_buffers())]
        order = [*self._parameter_names, *self._buffer_names, *dict.fromkeys(prefix + name for name in names)]
        layer = Layer(self.name, module, order, self.precision, self._averages)
        layer.head = head
        layer.modes, layer.kept, layer.left, layer.cached = self.modes, self.kept, self.left, self.cached
        layer.plain, layer.hooks, layer.whole, layer.operations = self.plain, self.hooks, self.whole, self.operations
        layer.may_lack_gradient, layer.checkpoints = self.may_lack_gradient, self.checkpoints
        layer.detached = self.detached
        return layer

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the layer, from the boundary before it to the one after it; tensors that the layer does not use pass through."""
        if self.compiled is not None:
            made = self.compiled(self.module.training, {**self.parameters(), **self.buffers()}, tensors)
            if made is not None:
                for name, buffer in made[1].items():
                    self.set_tensor(name, buffer)
                return made[0]
        with self._running():
            # Not module(...): a GraphModule prints to stderr before it raises, and running out of memory is no news here.
            result: tuple[Tensor, ...] = self.module.forward(*self.precision.to_memory_format(tensors))
        return result

    def scores(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the tensors of the layer's own loss: what its head makes of the outputs, class scores first; without a head, the outputs."""
        if self.head is None:
            return outputs
        with self.precision.autocast():
            made = self.head(outputs[0])
        return made if isinstance(made, tuple) else (made,)

    def run_on(self, tensors: dict[str, Tensor], *inputs: Tensor, scores: bool = False) -> tuple[Tensor, ...]:
        """Run the layer on other parameters and buffers than its own.

        Args:
            tensors: all parameters and buffers by name, the head's too; buffers may be changed, and those that the forward replaces are
                replaced in it.
            inputs: tensors of the boundary before the layer.
            scores: whether to return `scores` of the outputs instead of the outputs.
        """
        with self._running():
            inputs = self.precision.to_memory_format(inputs)
            outputs = torch.func.functional_call(self.module, tensors, inputs, tie_weights=False)
        return self.scores_on(tensors, tuple(outputs)) if scores else tuple(outputs)

    def scores_on(self, tensors: Mapping[str, Tensor], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute `scores` with other parameters and buffers than the head's own.

        Args:
            tensors: all parameters and buffers by name, as in `run_on`.
            outputs: outputs of the layer.
        """
        if self.head is None:
            return outputs
        prefix = next(name for name, module in self.module.named_modules() if module is self.head) + "."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        with self.precision.autocast():
            made = torch.func.functional_call(self.head, own, outputs, tie_weights=False)
        return made if isinstance(made, tuple) else (made,)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name in `state_dict` order; one that has several names in this layer is there under each."""
        return {name: self.module.get_parameter(name) for name in self._parameter_names}

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers by name, those that are not in the `state_dict` too, and frozen parameters that a forward changes."""
        return {
            name: self.module.get_parameter(name) if name in self._averages else self.module.get_buffer(name)
            for name in self._buffer_names
        }

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Replace a parameter or buffer of this layer.

        Args:
            name: one of `parameters()` or `buffers()`. Tied tensors are for the caller to replace.
            tensor: new tensor. In the place of a parameter, a tensor that is none becomes one, which requires a gradient if the
                replaced one did.

        Raises:
            KeyError: the layer has no tensor of that name.
        """
        path, _, attribute = name.rpartition(".")
        if name in self._parameter_names or name in self._averages:
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, self.module.get_parameter(name).requires_grad)
        elif name not in self._buffer_names:
            raise KeyError(f"layer {self.name!r} has no parameter or buffer {name!r}")
        # By setattr, for modules that keep a list of their weights beside it, as nn.LSTM does.
        setattr(self.module.get_submodule(path), attribute, tensor)

    def __repr__(self) -> str:
        return f"Layer({self.name!r})"


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Give a context in which PyTorch's own kernels run: cuDNN's recurrent ones cannot go back in eval mode."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def is_rowwise(layer: Layer) -> bool:
    """Decide whether a layer computes each row (all axes but the last) by itself: whether it is one `nn.Linear` over the last axis.

    Hooks would see each chunk of rows instead of all rows.
    """
    module = layer.module
    if not isinstance(module, fx.GraphModule) or any(hooks.see_gradients for hooks in layer.hooks.values()):
        return False
    operations = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    if len(operations) != 1:
        return False
    if operations[0].op == "call_module":
        linear = module.get_submodule(str(operations[0].target))
        is_plain = type(linear) is nn.Linear or is_stored_linear(linear)
        return is_plain and not has_module_hooks(linear) and "forward" not in vars(linear)
    return bool(operations[0].target is nn.functional.linear)


def python_state_of(layers: Iterable[Layer]) -> dict[str, Any]:
    """Return the Python attributes that forwards of layers change and the next ones read, by module and attribute; mostly none."""
    return {key: value for layer in layers for key, value in layer.python_state.items()}


def set_python_state(layers: Iterable[Layer], state: Mapping[str, Any]) -> None:
    """Set these attributes to copies of what `python_state_of` returned."""
    for layer in layers:
        layer.set_python_state(state)


def has_module_hooks(module: nn.Module) -> bool:
    """Decide whether hooks look at what goes into a module, or comes out of it, forward or backward."""
    return any(bool(getattr(module, kind, None)) for kind in MODULE_HOOKS)


def gradients_complete_at_once(layers: Sequence[Layer], *, in_chunks: bool) -> list[bool]:
    """Decide for each layer whether one backward through that layer alone completes its gradients.

    Not so for a layer with weights that another layer uses too, or that its backward takes the values of to its end, and for one whose
    backward runs in chunks of rows.

    Args:
        layers: layers of a chain, however it is partitioned.
        in_chunks: whether the backward of the last layer runs in chunks.
    """
    users: dict[int, set[int]] = {}
    tensors: list[list[Tensor]] = [list(layer.parameters().values()) for layer in layers]
    for number, own in enumerate(tensors):
        for tensor in own:
            users.setdefault(id(tensor), set()).add(number)
    chunked = len(layers) - 1 if in_chunks else None
    return [
        number != chunked and not layers[number].detached and all(users[id(tensor)] == {number} for tensor in own)
        for number, own in enumerate(tensors)
    ]

"""The tracer: records a model's forward as a graph of operations and of whole blocks (leaf modules), by torch.fx.

`torch.fx` runs the forward once with proxies for tensors. Containers are expanded: their forward is recorded operation by operation. A
block is a leaf: one call of a module that keeps its own code, and so its own dropout, stochastic depth and train or eval behaviour.
"""

import copy
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.proxies import Proxy, recorded_calls

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class ModeConstant(nn.Module):
    """A constant of a forward that depends on the mode, train or eval, as in `F.dropout(x, 0.5, self.training)`."""

    def __init__(self, in_train: Any, in_eval: Any) -> None:
        super().__init__()
        self.in_train, self.in_eval = in_train, in_eval

    def forward(self) -> Any:
        """Return the constant of the mode that this module is in."""
        return self.in_train if self.training else self.in_eval


@dataclass
class Trace:
    """A traced forward, and the constants that its graph refers to beyond the model's own modules, parameters and buffers."""

    graph: fx.Graph
    """One placeholder, one output; targets are qualified names of the model."""

    constants: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that are no parameter and no buffer, by the target of the `get_attr` nodes that read them."""

    mode_constants: dict[str, ModeConstant] = field(default_factory=dict)
    """Constants that depend on the mode, by the target of the `call_module` nodes that call them."""

    opened: frozenset[str] = frozenset()
    """Names of the modules whose forward is recorded operation by operation."""

    def only_fetches(self, node: fx.Node) -> bool:
        """Decide whether a node only fetches a tensor or a constant, so that every layer that uses it can fetch it for itself."""
        return node.op == "get_attr" or (node.op == "call_module" and node.target in self.mode_constants)


def trace(model: nn.Module, closed: Mapping[str, str] = MappingProxyType({})) -> Trace:
    """Trace a model's forward with one argument; further ones take their defaults.

    A module whose forward cannot be traced, or does other operations in train than in eval mode, is a leaf.

    Args:
        model: module that stays as it is; the values of its weights are not read.
        closed: modules that are not opened, whatever they hold, with the reason, as in "its forward ...".

    Returns:
        The graph, in which constants that depend on the mode are `ModeConstant` calls.

    Raises:
        CaptureError: the model's own forward cannot be traced.
    """
    expanded = {name for name in _modules_to_expand(model) if not any(leaf and _is_below(name, leaf) for leaf in closed)}
    while True:
        try:
            if "" in closed:
                raise _UntraceableError({""}, closed[""])
            with preserve_random_state():
                in_train, in_eval = _trace_once(model, expanded, training=True), _trace_once(model, expanded, training=False)
            return replace(_merge(in_train, in_eval), opened=frozenset(expanded))
        except _UntraceableError as error:
            if "" in error.names:
                raise CaptureError(
                    f"model {type(model).__name__} cannot be cut into layers: {error.reason}; move what its forward does there "
                    "into a module of its own, which then stays whole"
                ) from error
            expanded = {name for name in expanded if not any(_is_below(name, leaf) for leaf in error.names)}


def copy_structure(model: nn.Module, tensors: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Copy a model's modules, but none of its tensors.

    Args:
        model: any module.
        tensors: tensors of the copy by the `id` of the model's tensor that each replaces; the copy shares all others with the model.

    Raises:
        CaptureError: a module holds something that Python cannot copy.
    """
    own = [*model.parameters(), *model.buffers()]
    own += [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in own}
    memo.update(tensors or {})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the attributes of a user's modules raise
        raise CaptureError(
            f"model {type(model).__name__} cannot be copied: {first_line(error)}; keep such an object out of the modules' attributes"
        ) from error


def copy_on_meta(model: nn.Module) -> nn.Module:
    """Copy a model with tensors of the same shapes on torch's meta device.

    Args:
        model: any module.

    Raises:
        CaptureError: a module holds something that Python cannot copy.
    """
    twins: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        twin = torch.empty_like(tensor, device="meta")
        twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    return copy_structure(model, twins)


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the states of the CPU random generators of torch, Python and numpy at the end of the context."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def set_mode(model: nn.Module, training: bool) -> None:
    """Bring a model into train or eval mode by its own methods, which may return anything.

    Args:
        model: the user's model, or a copy of it.
        training: whether into train mode.
    """
    if training:
        model.train()
    else:
        model.eval()


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its class where it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class _UntraceableError(Exception):
    """Names of modules that must be leaves (the empty name: the model itself, which cannot be one), and the reason."""

    def __init__(self, names: set[str], reason: str) -> None:
        super().__init__(reason)
        self.names, self.reason = names, reason


def _is_below(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(f"{ancestor}.")


def _is_pure_container(module: nn.Module) -> bool:
    """Decide whether a module is a Sequential, ModuleList or ModuleDict with no forward of its own."""
    if "forward" in vars(module):
        return False
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _CONTAINERS)


def _is_composite(module: nn.Module) -> bool:
    """Decide whether a module is a block: it has children, weights and a forward of its own."""
    has_parts = any(True for _ in module.children()) and any(True for _ in module.parameters())
    return has_parts and not _is_pure_container(module)


def _modules_to_expand(model: nn.Module) -> set[str]:
    """Return the names of the modules to expand: `model` itself, and modules that hold a chain of blocks rather than being a block."""
    expanded: set[str] = set()

    def visit(name: str, module: nn.Module, in_container: bool) -> None:
        expanded.add(name)
        inside = in_container or isinstance(module, _CONTAINERS)
        for child_name, child in module.named_children():
            if _is_pure_container(child) or _holds_chain(child, below_container=inside):
                visit(f"{name}.{child_name}" if name else child_name, child, inside)

    visit("", model, False)
    return expanded


def _holds_chain(module: nn.Module, below_container: bool) -> bool:
    # A parametrized module's containers hold its weights' parametrizations, not blocks.
    if parametrize.is_parametrized(module):
        return False
    if not below_container:
        return any(_is_pure_container(child) for child in module.modules() if child is not module)
    containers = [part for part in module.modules() if isinstance(part, _CONTAINERS)]
    return any(sum(map(_is_composite, part.children())) >= 2 for part in containers)


def _random_state() -> tuple[Any, ...]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), pickle.dumps(np.random.get_state(legacy=False))


def _autocast_state() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


class _Tracer(fx.Tracer):
    """A tracer that expands the named modules, and raises for those that cannot be traced."""

    # Else arithmetic on a buffer would be done while tracing, and its result be frozen into the graph.
    proxy_buffer_attributes = True

    def __init__(self, expanded: set[str]) -> None:
        super().__init__()
        self._expanded = expanded
        self._stack: list[str] = []
        self._autocast = _autocast_state()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Call the model as a user does, hooks included, with one argument."""
        model = self.root

        def call(sample: Any) -> Any:
            # By its own class's __call__, which may be the user's.
            return self._expand("", lambda: model(sample))

        return call, [self.create_proxy("placeholder", "input", (), {})]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # Shapes of parameters are plain numbers while tracing; torch.fx has no such proxy for buffers.
        self.param_shapes_constant = isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._expanded

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if m is self.root:
            # Module.__call__ is patched while tracing, and would take the model for its own submodule.
            return m._call_impl(*args, **kwargs)
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        return self._expand(name, lambda: super(_Tracer, self).call_module(m, forward, args, kwargs))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled() and kind != "placeholder":
            raise RuntimeError("torch.no_grad() inside a forward is not seen by torch.fx")
        if _autocast_state() != self._autocast:
            raise RuntimeError("torch.autocast() inside a forward is not seen by torch.fx")
        node = super().create_node(kind, *args, **kwargs)
        node.meta["owner"] = self._stack[-1] if self._stack else ""
        return node

    def _expand(self, name: str, run: Callable[[], Any]) -> Any:
        self._stack.append(name)
        before = _random_state()
        try:
            result = run()
        except _UntraceableError:
            raise
        except Exception as error:  # whatever a user's forward raises when it is given proxies for tensors
            raise _UntraceableError({name}, f"its forward {_reason(error)}") from error
        if _random_state() != before:
            raise _UntraceableError({name}, "its forward draws random numbers that tracing would freeze")
        self._stack.pop()
        return result


def _reason(error: Exception) -> str:
    """Return in words why a forward cannot be traced."""
    text = first_line(error)
    if isinstance(error, fx.proxy.TraceError) and "control flow" in text:
        return "decides something by values or sizes of its input (as if, assert, while, or range do), which are not known while it is traced"
    if "unknown to einops" in text:
        return "calls a function of einops; take the layer of the same name from einops.layers.torch instead"
    return f"cannot be traced: {text}"


def _trace_once(model: nn.Module, expanded: set[str], training: bool) -> Trace:
    # A copy of its own each time: a forward may leave proxies in the attributes of its module.
    root = copy_structure(model)
    set_mode(root, training)
    tracer = _Tracer(expanded)
    with torch.enable_grad(), recorded_calls(tracer):
        graph = tracer.trace(root)
    registered = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    registered |= {name for name, _ in root.named_buffers(remove_duplicate=False)}
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in registered:
            value = _attribute(root, node.target)
            if not isinstance(value, Tensor):
                raise _UntraceableError({""}, f"its forward uses {node.target!r}, a {type(value).__name__} and no tensor")
            if value.is_meta:
                raise CaptureError(
                    f"model {type(model).__name__} uses a tensor without values, {node.target!r}, that is neither a parameter "
                    "nor a buffer; register it with register_buffer()"
                )
            constants[node.target] = value
    return Trace(graph, constants)


def _attribute(root: nn.Module, target: str) -> Any:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _merge(in_train: Trace, in_eval: Trace) -> Trace:
    """Make one graph of the graphs of the two modes, which may differ in constants but not in operations."""
    merged = Trace(in_train.graph, dict(in_train.constants))
    train_nodes, eval_nodes = list(in_train.graph.nodes), list(in_eval.graph.nodes)
    eval_node_of = dict(zip(train_nodes, eval_nodes, strict=False))

    def refuse(*nodes: fx.Node) -> NoReturn:
        owners = {str(node.meta["owner"]) for node in nodes}
        depth = max(owner.count(".") + bool(owner) for owner in owners)
        deepest = {owner for owner in owners if owner.count(".") + bool(owner) == depth}
        raise _UntraceableError(
            deepest, f"its forward does other operations in train than in eval mode, from {nodes[0].name!r} on"
        )

    def unite(train: Any, eval_: Any, user: fx.Node) -> Any:
        if isinstance(train, fx.Node) or isinstance(eval_, fx.Node):
            if not isinstance(train, fx.Node) or eval_node_of.get(train) is not eval_:
                refuse(user, eval_node_of[user])
            return train
        if isinstance(train, slice) and isinstance(eval_, slice):
            parts = [(getattr(train, part), getattr(eval_, part)) for part in ("start", "stop", "step")]
            return slice(*(unite(one, other, user) for one, other in parts))
        if isinstance(train, (tuple, list)) and type(train) is type(eval_) and len(train) == len(eval_):
            items = [unite(one, other, user) for one, other in zip(train, eval_, strict=True)]
            return type(train)(*items) if hasattr(train, "_fields") else type(train)(items)
        if isinstance(train, dict) and isinstance(eval_, dict) and train.keys() == eval_.keys():
            return {key: unite(train[key], eval_[key], user) for key in train}
        if type(train) is type(eval_) and train == eval_:
            return train
        if isinstance(train, (tuple, list, dict, slice)) or isinstance(eval_, (tuple, list, dict, slice)) or user.op == "output":
            refuse(user, eval_node_of[user])
        name = f"_lowmem_by_mode{len(merged.mode_constants)}"
        merged.mode_constants[name] = ModeConstant(train, eval_)
        with merged.graph.inserting_before(user):
            # `call_module` would look the name up in the traced copy.
            return merged.graph.create_node("call_module", name)

    for train, eval_ in eval_node_of.items():
        if (train.op, train.target) != (eval_.op, eval_.target):
            refuse(train, eval_)
        if train.target in in_train.constants and not _equal(in_train.constants[train.target], in_eval.constants[eval_.target]):
            refuse(train, eval_)
        train.args, train.kwargs = unite(train.args, eval_.args, train), unite(train.kwargs, eval_.kwargs, train)
    assert len(train_nodes) == len(eval_nodes)  # each graph ends with its only output node, so a longer one differs before that
    return merged


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other))

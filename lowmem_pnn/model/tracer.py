"""The tracer: records a model's forward as a graph in which only the containers are opened, and every block stays whole.

`torch.fx` runs the forward once with stand-ins for tensors. What is opened is seen operation by operation; a leaf is one call
of a module that keeps its own code, and so its own dropout, stochastic depth and train or eval behaviour.
"""

import copy
import operator
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from lowmem_pnn.errors import CaptureError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class ByMode(nn.Module):
    """A constant of a forward that is another in train than in eval mode, as in `F.dropout(x, 0.5, self.training)`."""

    def __init__(self, in_train: Any, in_eval: Any) -> None:
        super().__init__()
        self.in_train, self.in_eval = in_train, in_eval

    def forward(self) -> Any:
        """Give the constant of the mode that this module is in."""
        return self.in_train if self.training else self.in_eval


@dataclass
class Trace:
    """A traced forward, and what its graph refers to beyond the model's own modules, parameters and buffers."""

    graph: fx.Graph
    """One placeholder, one output; targets are qualified names of the model."""

    constants: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that are no parameter and no buffer, by the target of the `get_attr` nodes that read them."""

    by_mode: dict[str, ByMode] = field(default_factory=dict)
    """By the target of the `call_module` nodes that call them."""

    def is_free(self, node: fx.Node) -> bool:
        """Whether the node only fetches something, so that every layer that wants it can fetch it for itself."""
        return node.op == "get_attr" or (node.op == "call_module" and node.target in self.by_mode)


def trace(model: nn.Module) -> Trace:
    """Trace a model's forward with one argument; further ones take their defaults.

    A module whose inside cannot be traced, or is another in train than in eval mode, is left whole.

    Args:
        model: is not changed, nor are the values of its weights read.

    Returns:
        The graph, in which constants that follow the mode are `ByMode` calls.

    Raises:
        CaptureError: the model's own forward cannot be traced.
    """
    opened = _openable(model)
    while True:
        try:
            with random_state_kept():
                return _merge(_trace_once(model, opened, training=True), _trace_once(model, opened, training=False))
        except _ClosedError as closed:
            if "" in closed.names:
                raise CaptureError(
                    f"model {type(model).__name__} cannot be cut into layers: {closed.reason}; move what its forward does there "
                    "into a module of its own, which then stays whole"
                ) from closed
            opened = {name for name in opened if not any(_is_below(name, shut) for shut in closed.names)}


def copy_structure(model: nn.Module, tensors: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Copy a model's modules, but none of its tensors.

    Args:
        model: any module.
        tensors: what stands in the copy for the tensor with that `id`; all others are the model's very own.

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
            f"model {type(model).__name__} cannot be copied: {reason(error)}; keep such an object out of the modules' attributes"
        ) from error


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the CPU random generators of torch, Python and numpy back to where they were."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class _ClosedError(Exception):
    """Modules that must be left whole (the empty name: the model itself, which cannot be), and why."""

    def __init__(self, names: set[str], reason: str) -> None:
        super().__init__(reason)
        self.names, self.reason = names, reason


def _is_below(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(f"{ancestor}.")


def _is_pure_container(module: nn.Module) -> bool:
    """Whether it is a Sequential, ModuleList or ModuleDict with no forward of its own."""
    if "forward" in vars(module):
        return False
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _CONTAINERS)


def _is_composite(module: nn.Module) -> bool:
    """Whether it is a block: children, weights and a forward of its own."""
    has_parts = any(True for _ in module.children()) and any(True for _ in module.parameters())
    return has_parts and not _is_pure_container(module)


def _openable(model: nn.Module) -> set[str]:
    """Names of the modules to look into: `model` itself, and those that hold a chain of blocks rather than being one."""
    opened: set[str] = set()

    def visit(name: str, module: nn.Module, in_container: bool) -> None:
        opened.add(name)
        inside = in_container or isinstance(module, _CONTAINERS)
        for child_name, child in module.named_children():
            if _is_pure_container(child) or _holds_chain(child, below_container=inside):
                visit(f"{name}.{child_name}" if name else child_name, child, inside)

    visit("", model, False)
    return opened


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


class _Proxy(fx.Proxy):
    """A stand-in that changes in place as a tensor does: torch.fx takes `x += y` for `x = x + y`, and has no `x[i] = y`."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in (
    "iadd",
    "iand",
    "ifloordiv",
    "ilshift",
    "imatmul",
    "imod",
    "imul",
    "ior",
    "ipow",
    "irshift",
    "isub",
    "itruediv",
    "ixor",
):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Opens the modules it is told to, and says which of them cannot be traced."""

    # Else arithmetic on a buffer would be done while tracing, and its result be frozen into the graph.
    proxy_buffer_attributes = True

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self._opened = opened
        self._stack: list[str] = []
        self._autocast = _autocast_state()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Call the model as a user does, hooks included, with one argument."""
        model = self.root

        def call(sample: Any) -> Any:
            # Module.__call__ itself is patched while tracing and would take the model for its own submodule.
            return self._open("", lambda: model._call_impl(sample))

        return call, [self.create_proxy("placeholder", "input", (), {})]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # Shapes of parameters are plain numbers while tracing; torch.fx has no such stand-in for buffers.
        self.param_shapes_constant = isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._opened

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        return self._open(name, lambda: super(_Tracer, self).call_module(m, forward, args, kwargs))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled() and kind != "placeholder":
            raise RuntimeError("torch.no_grad() inside a forward is not seen by torch.fx")
        if _autocast_state() != self._autocast:
            raise RuntimeError("torch.autocast() inside a forward is not seen by torch.fx")
        node = super().create_node(kind, *args, **kwargs)
        node.meta["owner"] = self._stack[-1] if self._stack else ""
        return node

    def _open(self, name: str, run: Callable[[], Any]) -> Any:
        self._stack.append(name)
        before = _random_state()
        try:
            result = run()
        except _ClosedError:
            raise
        except Exception as error:  # whatever a user's forward raises when it is given stand-ins for tensors
            raise _ClosedError({name}, f"its forward cannot be traced: {reason(error)}") from error
        if _random_state() != before:
            raise _ClosedError({name}, "its forward draws random numbers that tracing would freeze")
        self._stack.pop()
        return result


def _trace_once(model: nn.Module, opened: set[str], training: bool) -> Trace:
    # A copy of its own each time: a forward may leave stand-ins in the attributes of its module.
    root = copy_structure(model).train(training)
    with torch.enable_grad():
        graph = _Tracer(opened).trace(root)
    registered = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    registered |= {name for name, _ in root.named_buffers(remove_duplicate=False)}
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in registered:
            value = _attribute(root, node.target)
            if not isinstance(value, Tensor):
                raise _ClosedError({""}, f"its forward uses {node.target!r}, a {type(value).__name__} and no tensor")
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
    """Make one graph of those of the two modes, which may differ in constants but not in operations."""
    merged = Trace(in_train.graph, dict(in_train.constants))
    train_nodes, eval_nodes = list(in_train.graph.nodes), list(in_eval.graph.nodes)
    twins = dict(zip(train_nodes, eval_nodes, strict=False))

    def differ(*nodes: fx.Node) -> NoReturn:
        owners = {str(node.meta["owner"]) for node in nodes}
        depth = max(owner.count(".") + bool(owner) for owner in owners)
        deepest = {owner for owner in owners if owner.count(".") + bool(owner) == depth}
        raise _ClosedError(deepest, f"its forward does other operations in train than in eval mode, from {nodes[0].name!r} on")

    def unite(ours: Any, theirs: Any, user: fx.Node) -> Any:
        if isinstance(ours, fx.Node) or isinstance(theirs, fx.Node):
            if not isinstance(ours, fx.Node) or twins.get(ours) is not theirs:
                differ(user, twins[user])
            return ours
        if isinstance(ours, slice) and isinstance(theirs, slice):
            parts = [(getattr(ours, part), getattr(theirs, part)) for part in ("start", "stop", "step")]
            return slice(*(unite(one, other, user) for one, other in parts))
        if isinstance(ours, (tuple, list)) and type(ours) is type(theirs) and len(ours) == len(theirs):
            items = [unite(one, other, user) for one, other in zip(ours, theirs, strict=True)]
            return type(ours)(*items) if hasattr(ours, "_fields") else type(ours)(items)
        if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
            return {key: unite(ours[key], theirs[key], user) for key in ours}
        if type(ours) is type(theirs) and ours == theirs:
            return ours
        if isinstance(ours, (tuple, list, dict, slice)) or isinstance(theirs, (tuple, list, dict, slice)) or user.op == "output":
            differ(user, twins[user])
        name = f"_lowmem_by_mode{len(merged.by_mode)}"
        merged.by_mode[name] = ByMode(ours, theirs)
        with merged.graph.inserting_before(user):
            # `call_module` would look the name up in the traced copy.
            return merged.graph.create_node("call_module", name)

    for ours, theirs in twins.items():
        if (ours.op, ours.target) != (theirs.op, theirs.target):
            differ(ours, theirs)
        if ours.target in in_train.constants and not _same(in_train.constants[ours.target], in_eval.constants[theirs.target]):
            differ(ours, theirs)
        ours.args, ours.kwargs = unite(ours.args, theirs.args, ours), unite(ours.kwargs, theirs.kwargs, ours)
    assert len(train_nodes) == len(eval_nodes)  # each graph ends with its only output node, so a longer one differs before that
    return merged


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other))

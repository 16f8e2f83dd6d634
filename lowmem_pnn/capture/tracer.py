"""The tracer: records a model's forward as a graph of operations and of whole blocks (leaf modules), by torch.fx.

`torch.fx` runs the forward once with proxies for tensors. Containers are expanded: their forward is recorded operation by operation. A
block is a leaf: one call of a module that keeps its own code, and so its own dropout, stochastic depth and train or eval behaviour.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from lowmem_pnn.capture.examples import Examples
from lowmem_pnn.capture.opening import CONTAINERS, depth_of, is_below
from lowmem_pnn.capture.proxies import BatchError, Proxy, Shape, recorded_calls
from lowmem_pnn.capture.setting import Setting
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.call_form import NOTHING, OutputForm, like
from lowmem_pnn.model.copies import copy_structure, first_line, set_mode
from lowmem_pnn.seeds import preserve_random_state, random_generators


class UntraceableError(Exception):
    """Names of modules that must be leaves (the empty name: the model itself, which cannot be one), and the reason."""

    def __init__(self, names: set[str], reason: str) -> None:
        super().__init__(reason)
        self.names, self.reason = names, reason


class UncutError(CaptureError):
    """A model whose own forward cannot be traced; in words why, as in "its forward ..."."""

    def __init__(self, model: nn.Module, reason: str) -> None:
        super().__init__(f"model {type(model).__name__} cannot be cut into layers: {reason}")
        self.reason = reason


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
    """A placeholder for each input, and one output; targets are qualified names of the model."""

    constants: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that are no parameter and no buffer, by the target of the `get_attr` nodes that read them."""

    mode_constants: dict[str, ModeConstant] = field(default_factory=dict)
    """Constants that depend on the mode, by the target of the `call_module` nodes that call them."""

    opened: frozenset[str] = frozenset()
    """Names of the modules whose forward is recorded operation by operation."""

    stopped: dict[str, str] = field(default_factory=dict)
    """Modules that could not be opened, with the reason, as in "its forward ..."."""

    asked_of_batch: frozenset[str] = frozenset()
    """Opened modules that decide something by the number of samples, be it the same for the batches that were tried."""

    otherwise: frozenset[int] = frozenset()
    """Numbers of samples that will occur for which such a decision is another one."""

    output: OutputForm | None = None
    """What the model returns beside its tensors; None before the graphs of both modes are one."""

    def only_fetches(self, node: fx.Node) -> bool:
        """Decide whether a node only fetches a tensor or a constant, so that every layer that uses it can fetch it for itself."""
        return node.op == "get_attr" or (node.op == "call_module" and node.target in self.mode_constants)

    def calls_and_after(self, modules: Collection[str]) -> set[fx.Node]:
        """Return the nodes that call any of some modules, or one with such a module in it, and all that depend on these nodes.

        Args:
            modules: names of modules.
        """
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            calls = node.op == "call_module" and any(is_below(name, str(node.target)) for name in modules)
            if calls or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found


def merge(in_train: Trace, in_eval: Trace) -> Trace:
    """Make one graph of the graphs of the two modes, which may differ in constants but not in operations.

    Args:
        in_train: the trace in train mode, whose graph is changed.
        in_eval: the trace in eval mode.

    Raises:
        UntraceableError: they do other operations.
    """
    merged = replace(
        in_train,
        constants=dict(in_train.constants),
        asked_of_batch=in_train.asked_of_batch | in_eval.asked_of_batch,
        otherwise=in_train.otherwise | in_eval.otherwise,
    )
    train_nodes, eval_nodes = list(in_train.graph.nodes), list(in_eval.graph.nodes)
    eval_node_of = dict(zip(train_nodes, eval_nodes, strict=False))

    def refuse(*nodes: fx.Node) -> NoReturn:
        owners = {str(node.meta["owner"]) for node in nodes}
        depth = max(depth_of(owner) for owner in owners)
        deepest = {owner for owner in owners if depth_of(owner) == depth}
        raise UntraceableError(
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
    if isinstance(one, FakeTensor) or isinstance(other, FakeTensor):
        return False  # of no values: what a module has made in a shape's stead is no constant
    return one is other or (one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other))


def trace(
    model: nn.Module,
    setting: Setting,
    opened: set[str],
    closed: Mapping[str, str] = MappingProxyType({}),
    returns_tensor: bool = False,
) -> Trace:
    """Trace a model's forward; arguments that get no samples take their defaults.

    A module whose forward cannot be traced, or does other operations in train than in eval mode, is a leaf.

    Args:
        model: module that stays as it is; the values of its weights are not read.
        setting: how the model is called, and on what; for any batch size, and in any mode.
        opened: modules to open, the model itself, "", among them.
        closed: modules that are not opened, whatever they hold, with the reason, as in "its forward ...".
        returns_tensor: whether it is known to return one tensor, in nothing.

    Returns:
        The graph, in which constants that depend on the mode are `ModeConstant` calls.

    Raises:
        UncutError: the model's own forward cannot be traced.
    """
    stopped = dict(closed)
    while True:
        expanded = {name for name in opened if not any(leaf and is_below(name, leaf) for leaf in stopped)}
        try:
            if "" in stopped:
                raise UntraceableError({""}, stopped[""])
            with preserve_random_state():
                in_train, in_eval = (
                    _trace_once(model, replace(setting, training=mode), expanded, returns_tensor) for mode in (True, False)
                )
            if in_train.output != in_eval.output:
                raise CaptureError(
                    f"model {type(model).__name__} returns {in_train.output} in train mode and {in_eval.output} in eval mode; wrap it in a "
                    "module that returns the same in both"
                )
            return replace(merge(in_train, in_eval), opened=frozenset(expanded), stopped=stopped)
        except UntraceableError as error:
            if "" in error.names:
                raise UncutError(model, error.reason) from error
            # Others of the same class would stop the next attempt.
            kinds = {type(model.get_submodule(name)) for name in error.names} - {*CONTAINERS}
            alike = {name for name in expanded if name and type(model.get_submodule(name)) in kinds}
            stopped |= dict.fromkeys(error.names | alike, error.reason)


def _autocast_state() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


class _Tracer(fx.Tracer):
    """A tracer that expands the named modules, and raises for those that cannot be traced."""

    # Else arithmetic on a buffer would be done while tracing, and its result be frozen into the graph.
    proxy_buffer_attributes = True

    # Parameters answer for themselves, as all proxies do here.
    param_shapes_constant = False

    def __init__(self, setting: Setting, expanded: set[str], examples: Examples, returns_tensor: bool) -> None:
        super().__init__()
        self._setting, self._expanded, self._examples = setting, expanded, examples
        self._returns_tensor = returns_tensor
        self._stack: list[str] = []
        self._autocast = _autocast_state()
        self.asked_of_batch: set[str] = set()
        self.otherwise: set[int] = set()
        self.output = NOTHING

    def values_of(self, node: fx.Node) -> tuple[Any, ...] | None:
        """Return the values of a node for two batch sizes; None where they are not known."""
        return self._examples.of(node)

    def depends_on_batch(self, node: fx.Node) -> bool:
        """Decide whether a node's value, which is no tensor, depends on the number of samples."""
        return self._examples.of_batch(node)

    def asked_of(self, node: fx.Node, convert: Callable[[Any], Any], number: Any) -> None:
        """Take down that a forward decides something by a node's value, and what that was converted to."""
        if self._examples.of_batch(node):
            self.asked_of_batch.add(self._stack[-1])
            self.otherwise |= self._examples.otherwise(node, convert, number, self._setting.batches)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Call the model as a user does, hooks included."""
        model = self.root

        def call(*samples: Any) -> Any:
            # By its own class's __call__, which may be the user's.
            return self._expand("", lambda: self._flattened(self._setting.form.call(model, samples)))

        names = self._setting.form.names
        names = ("input",) if len(names) == 1 else tuple(f"input_{number}" for number in range(len(names)))
        return call, [self.create_proxy("placeholder", name, (), {}) for name in names]

    def _flattened(self, value: Any) -> tuple[Any, ...]:
        self.output, tensors = OutputForm.of(value, None if self._returns_tensor else self._parts_of)
        return tensors

    def _parts_of(self, value: Any) -> Any:
        """Return what a proxy stands for, where that is a tuple, dict or the like, with a proxy for each item."""
        values = self.values_of(value.node) if isinstance(value, fx.Proxy) else None
        if values is None or isinstance(values[0], Tensor):
            return value
        return like(values[0], value)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._examples.is_running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        return super().create_arg(tuple(a) if type(a) is Shape else a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._expanded

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._examples.is_running:
            return forward(*args, **kwargs)
        if m is self.root:
            # Module.__call__ is patched while tracing, and would take the model for its own submodule.
            return m._call_impl(*args, **kwargs)
        try:
            name = self.path_of_module(m)
        except NameError:
            if any(True for _ in m.parameters()):
                raise
            # It was made in the forward that calls it, as nn.ReLU()(x).
            return forward(*args, **kwargs)
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
        if kind == "call_function" and args[0] in (torch.autograd.grad, torch.autograd.backward):
            raise RuntimeError("torch.autograd inside a forward takes the whole of it")
        node = super().create_node(kind, *args, **kwargs)
        node.meta["owner"] = self._stack[-1] if self._stack else ""
        return node

    def _expand(self, name: str, run: Callable[[], Any]) -> Any:
        self._stack.append(name)
        before = random_generators()
        try:
            result = run()
        except UntraceableError:
            raise
        except Exception as error:  # whatever a user's forward raises when it is given proxies for tensors
            raise UntraceableError({name}, f"its forward {_reason(error)}") from error
        if random_generators() != before:
            raise UntraceableError({name}, "its forward draws random numbers that tracing would freeze")
        self._stack.pop()
        return result


def _reason(error: Exception) -> str:
    """Return in words why a forward cannot be traced."""
    text = first_line(error)
    if isinstance(error, BatchError):
        return text
    if isinstance(error, fx.proxy.TraceError) and "control flow" in text:
        return (
            "decides something by values of its input (as if, assert, while, or range do), which are not known while it is traced"
        )
    if "unknown to einops" in text:
        return "calls a function of einops; take the layer of the same name from einops.layers.torch instead"
    return f"cannot be traced: {text}"


def _trace_once(model: nn.Module, setting: Setting, expanded: set[str], returns_tensor: bool) -> Trace:
    # A copy of its own each time: a forward may leave proxies in the attributes of its module.
    root = copy_structure(model)
    set_mode(root, setting.training)
    examples = Examples(model, [replace(setting, batch=batch) for batch in (2, 3)], root)
    tracer = _Tracer(setting, expanded, examples, returns_tensor)
    with torch.enable_grad(), recorded_calls(tracer):
        graph = tracer.trace(root)
    for node in reversed(graph.nodes):
        # A size that was asked for and not used, or a number that is part of the graph instead.
        is_size = node.op == "call_method" and node.target == "size"
        if not node.users and (is_size or "is_constant" in node.meta):
            graph.erase_node(node)
    registered = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    registered |= {name for name, _ in root.named_buffers(remove_duplicate=False)}
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in registered:
            value = _attribute(root, node.target)
            if not isinstance(value, Tensor):
                raise UntraceableError({""}, f"its forward uses {node.target!r}, a {type(value).__name__} and no tensor")
            if value.is_meta:
                raise CaptureError(
                    f"model {type(model).__name__} uses a tensor without values, {node.target!r}, that is neither a parameter "
                    "nor a buffer; register it with register_buffer()"
                )
            constants[node.target] = value
    asked, otherwise = frozenset(tracer.asked_of_batch), frozenset(tracer.otherwise)
    return Trace(graph, constants, asked_of_batch=asked, otherwise=otherwise, output=tracer.output)


def _attribute(root: nn.Module, target: str) -> Any:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value

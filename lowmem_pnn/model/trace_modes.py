"""Traces of a model's forward, and the one trace of both modes, train and eval."""

from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from lowmem_pnn.model.call_form import OutputForm
from lowmem_pnn.model.opening import depth_of


class UntraceableError(Exception):
    """Names of modules that must be leaves (the empty name: the model itself, which cannot be one), and the reason."""

    def __init__(self, names: set[str], reason: str) -> None:
        super().__init__(reason)
        self.names, self.reason = names, reason


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

    output: OutputForm | None = None
    """What the model returns beside its tensors; None before the graphs of both modes are one."""

    def only_fetches(self, node: fx.Node) -> bool:
        """Decide whether a node only fetches a tensor or a constant, so that every layer that uses it can fetch it for itself."""
        return node.op == "get_attr" or (node.op == "call_module" and node.target in self.mode_constants)


def merge(in_train: Trace, in_eval: Trace) -> Trace:
    """Make one graph of the graphs of the two modes, which may differ in constants but not in operations.

    Args:
        in_train: the trace in train mode, whose graph is changed.
        in_eval: the trace in eval mode.

    Raises:
        UntraceableError: they do other operations.
    """
    merged = replace(
        in_train, constants=dict(in_train.constants), asked_of_batch=in_train.asked_of_batch | in_eval.asked_of_batch
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
    return one is other or (one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other))

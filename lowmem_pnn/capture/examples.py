"""Examples: values of a graph's nodes on fake tensors of two batch sizes, computed when a forward that is being traced asks for them.

A forward asks for shapes, types and devices: all sizes but the batch's are fixed, and are answered from the examples. What differs between
the two batch sizes is the batch's, and stays a node of the graph.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree

from lowmem_pnn.capture.setting import Setting
from lowmem_pnn.seeds import preserve_random_state

# What a tensor says of autograd depends on where the model is cut.
_OF_AUTOGRAD = frozenset({"requires_grad", "grad", "grad_fn", "is_leaf", "_version"})
# Modules of the functions that compute numbers of numbers.
_OF_NUMBERS = ("_operator", "operator", "builtins", "math")


class Examples:
    """Values of a graph's nodes, for as long as the graph is being made.

    Args:
        model: the user's model.
        settings: how it is run: two batch sizes in one mode.
        root: the copy of the model that is traced, which holds constants that the graph refers to.
    """

    def __init__(self, model: nn.Module, settings: Sequence[Setting], root: nn.Module) -> None:
        self._model, self._settings, self._root = model, settings, root
        self._runs: list[_Run] | None = None
        self.is_running = False

    def of(self, node: fx.Node) -> tuple[Any, ...] | None:
        """Return the values of a node, one for each setting; None where they cannot be computed.

        Args:
            node: node of the graph that is being made.
        """
        if node.target is getattr and node.args[1] in _OF_AUTOGRAD:
            return None
        self.is_running = True
        try:
            with preserve_random_state():
                if self._runs is None:
                    self._runs = [_Run(self._model, setting, self._root, node.graph) for setting in self._settings]
                return tuple(run.value(node) for run in self._runs)
        except Exception:  # whatever a user's module raises: then the question stays open
            self._runs = []
            return None
        finally:
            self.is_running = False

    def of_batch(self, node: fx.Node) -> bool:
        """Decide whether a number, or what else a node computes from sizes, depends on the number of samples.

        Args:
            node: node whose values are no tensors, or known ones.
        """
        stack, seen = [node], {node}
        while stack:
            inner = stack.pop()
            values = self.of(inner)
            if values is None or not (are_plain(values) or all(map(is_known, values))):
                continue
            if any(_differ(value, values[0]) for value in values[1:]):
                return True
            new = [source for source in inner.all_input_nodes if source not in seen]
            seen.update(new)
            stack.extend(new)
        return False

    def otherwise(self, node: fx.Node, convert: Callable[[Any], Any], number: Any, batches: Iterable[int]) -> set[int]:
        """Return for which numbers of samples a decision is another one; none where it takes more than sizes to know.

        Args:
            node: node whose value is decided by.
            convert: makes a number or a truth of it.
            number: what it makes of the examples.
            batches: numbers of samples.
        """
        found = set()
        for batch in batches:
            try:
                if convert(self._at(node, batch)) != number:
                    found.add(batch)
            except Exception:  # whatever a function raises for such a number: then the forward does so too, or nothing is known
                continue
        return found

    def _at(self, node: fx.Node, batch: int) -> Any:
        """Return what a number, or a truth, is for any number of samples, sizes growing in a straight line with it."""
        values, (few, more) = self.of(node), (setting.batch for setting in self._settings)
        if values is None or not all(isinstance(value, bool | int | float) for value in values):
            raise LookupError(node)
        if node.op == "call_method" and node.target == "size":
            return values[0] + (values[1] - values[0]) * (batch - few) // (more - few)
        if node.op != "call_function" or getattr(node.target, "__module__", "") not in _OF_NUMBERS:
            raise LookupError(node)
        return node.target(*fx.node.map_arg(node.args, lambda source: self._at(source, batch)))  # type: ignore[operator]


class _Run(fx.Interpreter):
    """The nodes of a graph that are there by now, run on fake tensors."""

    def __init__(self, model: nn.Module, setting: Setting, root: nn.Module, graph: fx.Graph) -> None:
        self._fakes = setting.fakes(model)
        super().__init__(self._fakes.root, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self._precision, self._traced, self._keeps_values = setting.precision, root, setting.keeps_values
        self._inputs = iter(self._fakes.samples)
        self._last: fx.Node = graph._root

    def value(self, node: fx.Node) -> Any:
        """Return a node's value, after all nodes before it have run, in their order."""
        with self._fakes.context():
            while node not in self.env:
                self._last = self._last.next
                self.env[self._last] = self.run_node(self._last)
        return self.env[node]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is getattr and isinstance(args[0], Tensor) and args[1] in ("device", "is_cuda", "is_cpu"):
            # Where the model will be; its fake tensors may be elsewhere.
            device = torch.device(self._precision.device_type)
            return device if args[1] == "device" else device.type == args[1].removeprefix("is_")
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "get_device" and isinstance(args[0], Tensor):
            return -1 if self._precision.device_type == "cpu" else 0
        return super().call_method(target, args, kwargs)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self._inputs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        try:
            return self.fetch_attr(target)
        except RuntimeError:
            value: Any = self._traced
            for part in str(target).split("."):
                value = getattr(value, part)
            return value if not isinstance(value, Tensor) or self._keeps_values else self._fakes.mode.from_tensor(value)


def is_known(value: Any) -> bool:
    """Decide whether a value is a tensor that is not fake: one that depends on sizes and constants alone."""
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _differ(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one != other)
    with unset_fake_temporarily():
        return one.shape != other.shape or not torch.equal(one, other)


def are_plain(values: Sequence[Any]) -> bool:
    """Decide whether values are no tensors and hold none."""
    return not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(list(values)))

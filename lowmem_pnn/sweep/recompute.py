"""Recompute without unneeded products: the forward before a backward leaves out matrix products that no gradient looks at.

    mlp:  x --[norm]--[up]--[gelu]--[down]--[dropout]--(+ x)--> output
                                      ^ no gradient depends on this product, but for its shape

A partition that runs forward again, to go backward, has given its outputs before. The gradient of a linear layer needs its inputs, not
its outputs; and additions, changes of shape and dropout go back without any of the values. So a linear layer whose outputs reach the
partition's end through such operations alone is called without its product. Its node in the graph of gradients is PyTorch's own, with
the tensors that it saves: every gradient is the same, bit for bit. (PyTorch's `checkpoint` leaves out the same where it stops early,
once per checkpointed block.)
"""

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowmem_pnn.dispatch_mode import DispatchMode
from lowmem_pnn.model.copies import copy_structure
from lowmem_pnn.model.layer import Layer, has_module_hooks

# Operations whose gradients do not depend on the values of their inputs. None of them works in place: the graph does not tell which
# other tensors show the same memory.
_FUNCTIONS = frozenset({operator.add, operator.sub, torch.add, torch.sub, torch.flatten, torch.reshape, torch.transpose})
_METHODS = frozenset({"add", "sub", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous"})
_MODULES = (nn.Dropout, nn.Identity)


def unneeded_products(layer: Layer) -> tuple[nn.Module, ...]:
    """Return the linear modules whose outputs no gradient of a layer depends on; none where its forward cannot be traced.

    Args:
        layer: last layer of a partition; it is left in train mode.
    """
    layer.train()
    if layer.kept:
        return ()
    try:
        # A copy: a forward may leave proxies in the attributes of its module.
        nodes = fx.Tracer().trace(copy_structure(layer.module)).nodes
    except Exception:  # whatever a module's forward raises when it is given no tensors
        return ()

    def module_of(node: fx.Node) -> nn.Module | None:
        return layer.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def ignores_values(node: fx.Node) -> bool:
        """Decide whether a node's gradients do not depend on the values of its inputs."""
        known = {"output": True, "call_function": node.target in _FUNCTIONS, "call_method": node.target in _METHODS}
        module = module_of(node)
        return known.get(node.op, type(module) in _MODULES and not has_module_hooks(module))  # type: ignore[arg-type]

    # From the end on, so that the users of a node come before it. A node without users may be there for its effect on another value.
    unneeded: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op == "output" or (node.users and all(ignores_values(user) and user in unneeded for user in node.users)):
            unneeded.add(node)
    calls = Counter(module_of(node) for node in nodes)
    # A module that is called twice may be needed at the other call, and hooks may look at outputs.
    return tuple(
        module
        for node in nodes
        if node in unneeded
        and type(module := module_of(node)) is nn.Linear
        and calls[module] == 1
        and not has_module_hooks(module)
        and "forward" not in vars(module)
    )


def without_products(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Have linear modules return NaN, so that no output is taken for a value, with the gradients of their true outputs.

    Args:
        modules: modules that `unneeded_products` returned; each is called once inside the context.
    """
    return called_by(modules, _call)


@contextmanager
def called_by(modules: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Have another function called in the place of the forward of some modules, inside the context.

    Args:
        modules: modules whose forward is that of their class.
        call: function of a module's own forward, and of what that would be given.
    """
    for module in modules:
        module.forward = partial(call, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _call(forward: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with _NoProducts():
        return forward(*tensors)


class _NoProducts(DispatchMode):
    """Replaces matrix products by NaN. It works below autograd, which records the products as always."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            left, right = args[-2:]
            return left.new_full((left.shape[0], right.shape[1]), math.nan)
        return func(*args, **(kwargs or {}))

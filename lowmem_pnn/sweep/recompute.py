"""Early stop: a recompute leaves out what backward does not look at.

    mlp:  x --[norm]--[up]--[gelu]--[down]--[dropout]--(+ x)--> output
                                      ^ this product is in no gradient but by its shape

A partition that runs forward again, to go backward, has given its outputs before. The gradient of a linear layer needs what went in,
not what comes out; neither do additions, changes of shape and dropout look at values. So a linear layer of which nothing else is
made at a partition's end is called without its product. Its node in the graph of gradients is PyTorch's own, with what it keeps: not
a bit of any gradient changes. (PyTorch's `checkpoint` spares the same where it stops early, once per checkpointed block.)
"""

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_pnn.model.layer import Layer

# What gives gradients without a look at the values that go in. Nothing that works in place: what else shows the same memory does not
# follow from it in the graph.
_FUNCTIONS = frozenset({operator.add, operator.sub, torch.add, torch.sub, torch.flatten, torch.reshape, torch.transpose})
_METHODS = frozenset({"add", "sub", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous"})
_MODULES = (nn.Dropout, nn.Identity)


def unneeded_products(layer: Layer) -> tuple[nn.Module, ...]:
    """The linear layers whose outputs no gradient of a layer depends on; none where its forward cannot be traced.

    Args:
        layer: the last of a partition; it is left in train mode.
    """
    layer.module.train()
    try:
        nodes = fx.Tracer().trace(layer.module).nodes
    except Exception:  # whatever a module's forward raises when it is given no tensors
        return ()

    def module_of(node: fx.Node) -> nn.Module | None:
        return layer.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_blind(node: fx.Node) -> bool:
        """Whether a node's gradients do not depend on the values that go in."""
        known = {"output": True, "call_function": node.target in _FUNCTIONS, "call_method": node.target in _METHODS}
        return known.get(node.op, type(module_of(node)) in _MODULES)

    # From the end on: what is made of a node comes after it. What nothing is made of may be there for its effect on something else.
    unseen: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op == "output" or (node.users and all(is_blind(user) and user in unseen for user in node.users)):
            unseen.add(node)
    calls = Counter(module_of(node) for node in nodes)
    # What is called elsewhere too may be needed there, and hooks may look at outputs.
    return tuple(
        module
        for node in nodes
        if node in unseen
        and type(module := module_of(node)) is nn.Linear
        and calls[module] == 1
        and not module._forward_hooks
        and "forward" not in vars(module)
    )


@contextmanager
def without_products(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have linear layers give no numbers (NaN, so that none is taken for a value), with the gradients of what they would have given.

    Args:
        modules: as `unneeded_products` gives them; called once each.
    """
    for module in modules:
        module.forward = partial(_call, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _call(forward: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with _NoProducts():  # type: ignore[no-untyped-call]
        return forward(*tensors)


class _NoProducts(TorchDispatchMode):
    """Matrix products are not computed. This is below autograd, which notes them as ever."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            left, right = args[-2:]
            return left.new_full((left.shape[0], right.shape[1]), math.nan)
        return func(*args, **(kwargs or {}))

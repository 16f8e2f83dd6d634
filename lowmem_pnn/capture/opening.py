"""Opening: which modules of a model are looked into when it is cut, and which ones stay whole.

A module that holds a chain of blocks is opened, and so is one that holds most of the weights. A block stays whole, unless it alone is
more than a small share of the model: then its parts may be cut apart.
"""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowmem_pnn.model.modes import overrides

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Containers of PyTorch."""

LARGE_SHARE = 1 / 8
"""A block of more than this share of a model's weights, or of its activations, is opened."""

LARGE_WEIGHT_BYTES = 1 << 20
"""A block with fewer bytes of weights is not opened for them: no budget is so small that it would matter."""

LARGE_ACTIVATION_BYTES = 1 << 18
"""A block that makes fewer bytes for each sample is not opened for them."""


def is_below(name: str, ancestor: str) -> bool:
    """Decide whether a module is another one, or inside it.

    Args:
        name: qualified name of the module.
        ancestor: qualified name of the other one; not the model itself.
    """
    return name == ancestor or name.startswith(f"{ancestor}.")


def depth_of(name: str) -> int:
    """Return how many modules a module is inside of, the model itself included."""
    return name.count(".") + bool(name)


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters, tied ones once."""
    return sum(_bytes(parameter) for parameter in module.parameters())


def chains_of_blocks(model: nn.Module) -> set[str]:
    """Return the names of the modules to open at least: the model, and modules that hold a chain of blocks rather than being a block.

    Args:
        model: the user's model.
    """
    opened: set[str] = set()

    def visit(name: str, module: nn.Module, in_container: bool) -> None:
        opened.add(name)
        inside = in_container or isinstance(module, CONTAINERS)
        children = dict(module.named_children())
        for child_name, child in children.items():
            if _is_pure_container(child) or _holds_chain(child, below_container=inside):
                visit(_join(name, child_name), child, inside)
            elif _can_be_opened(child) and 2 * weight_bytes(child) > total and not parametrize.is_parametrized(child):
                # It holds most of the weights: the model is inside of it, whatever is around it.
                visit(_join(name, child_name), child, False)

    total = weight_bytes(model)
    visit("", model, False)
    return opened


def large_blocks(model: nn.Module, opened: set[str], heavy: set[str]) -> set[str]:
    """Return the names of further modules to open: stages that hold several blocks, and blocks that are large.

    Args:
        model: the user's model.
        opened: modules that are opened already.
        heavy: modules that make more than a small share of the activations.
    """
    total = weight_bytes(model)
    found: set[str] = set()

    def visit(name: str, module: nn.Module) -> None:
        own = weight_bytes(module)
        is_large = own > LARGE_SHARE * total and own > LARGE_WEIGHT_BYTES
        if name in opened or (_can_be_opened(module) and (is_large or name in heavy)):
            if name not in opened:
                found.add(name)
            for child_name, child in module.named_children():
                visit(_join(name, child_name), child)

    visit("", model)
    return found


def opened_blocks(model: nn.Module, opened: set[str]) -> set[str]:
    """Return those of the opened modules that are blocks themselves: they stand in a container, and hold no chain of others.

    A block that holds most of a model's weights is opened as a model inside of another one would be.

    Args:
        model: the user's model.
        opened: modules that `chains_of_blocks` opens.
    """

    def is_block(name: str) -> bool:
        module, container = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        return _is_composite(module) and not _holds_chain(module, below_container=True) and _is_pure_container(container)

    return {name for name in opened if name and is_block(name)}


def parents(name: str) -> Iterator[str]:
    """Return the names of the modules that a module is inside of, the innermost first, but not the model itself."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _is_pure_container(module: nn.Module) -> bool:
    """Decide whether a module is a Sequential, ModuleList or ModuleDict with no forward of its own."""
    if "forward" in vars(module):
        return False
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in CONTAINERS)


def _is_composite(module: nn.Module) -> bool:
    """Decide whether a module is a block: it has children, weights and a forward of its own."""
    has_parts = any(True for _ in module.children()) and any(True for _ in module.parameters())
    return has_parts and not _is_pure_container(module)


def _holds_chain(module: nn.Module, below_container: bool) -> bool:
    # A parametrized module's containers hold its weights' parametrizations, not blocks.
    if parametrize.is_parametrized(module):
        return False
    if not below_container:
        return any(_is_pure_container(child) for child in module.modules() if child is not module)
    containers = [part for part in module.modules() if isinstance(part, CONTAINERS)]
    return any(sum(map(_is_composite, part.children())) >= 2 for part in containers)


def _can_be_opened(module: nn.Module) -> bool:
    """Decide whether there are parts inside a module that can be cut apart."""
    if isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module) or overrides(module, "_apply"):
        return False
    return any(True for child in module.children() for _ in child.parameters())

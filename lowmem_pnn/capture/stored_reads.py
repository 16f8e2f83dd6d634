"""Reads of stored weights: what other code than a module's own forward reads of its weight is not what the model has there.

self.proj(x)                         the module's forward casts what is kept, as it computes
x.to(self.proj.weight.dtype)         the type in which it is kept, not the model's
F.linear(x, self.words.weight)       what is kept: codes, without their scales

A model is run on fake tensors once, and what it reads so is kept in its own type.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from lowmem_pnn.capture.dispatch_modes import tensors_in, watching_calls
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.quantization.stored_weights import Stored

# What is the same in whichever form a weight is kept, and what is so in a form of the matrix's shape.
_OF_ANY_FORM = frozenset({
    "device", "get_device", "is_cuda", "is_cpu", "is_meta", "layout", "requires_grad", "grad", "grad_fn", "is_leaf", "_version", "is_inference",
    "untyped_storage",
})  # fmt: skip
_OF_SHAPE = frozenset({"shape", "size", "ndim", "dim", "numel", "nelement", "__len__"})


class StoredReadError(ConfigError):
    """A forward reads weights, which are kept in a smaller type, by itself.

    Args:
        title: class of the model.
        names: names of the modules that the weights are of.
    """

    def __init__(self, title: str, names: Collection[str]) -> None:
        super().__init__(
            f"forward of model {title} reads the weight of {min(names)!r} without calling it, which is kept in a smaller type "
            "(--frozen-dtype, --weights-dtype); keep it in fp32"
        )
        self.names = frozenset(names)


class StoredReads(TorchFunctionMode):
    """A mode that takes down which stored weights are read by other code than that of their own modules.

    Args:
        root: a model, or a copy of it.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in root.named_modules()}
        self._owners: dict[int, list[nn.Module]] = {}
        for module in self._names:
            for part in module.parts().values() if isinstance(module, Stored) else ():
                self._owners.setdefault(id(part), []).append(module)
        self._running: list[nn.Module] = []
        self._found: set[nn.Module] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take down what the model reads, while it runs."""
        if not self._owners:
            yield
            return

        def enter(module: nn.Module, args: Any) -> None:
            self._running.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()

        with watching_calls(enter, leave), self:
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__  # of the attribute
        for tensor in tensors_in((args, kwargs)):
            owners = self._owners.get(id(tensor), [])
            if owners and not self._may_ask(name, owners):
                self._found.update(owners)
        return func(*args, **kwargs)

    def _may_ask(self, name: str, owners: Sequence[nn.Module]) -> bool:
        """Decide whether one of a weight's modules asks, or what is asked for does not depend on the form."""
        if name in _OF_ANY_FORM or any(one is owner for one in self._running[-1:] for owner in owners):
            return True
        return name in _OF_SHAPE and all(
            one.stored.layout()[""][1] == one.stored.shape for one in owners if isinstance(one, Stored)
        )

    def refuse(self, title: str, repeats: Sequence[tuple[nn.Module, nn.Module]] | None = None) -> None:
        """Refuse what was read.

        Args:
            title: class of the model.
            repeats: blocks that did as others before them, with these; None where the model did not run to its end. Then what reads a
                weight is taken to read those of the same name in modules of the same class.

        Raises:
            StoredReadError: something was.
        """
        found = set(self._found)
        for block, other in repeats or ():
            found |= {module for module, one in zip(block.modules(), other.modules(), strict=True) if one in found}
        if found and repeats is None:
            kinds = set(map(self._kind, found))
            found |= {module for owners in self._owners.values() for module in owners if self._kind(module) in kinds}
        if found:
            raise StoredReadError(title, [self._names[module] for module in found])

    def _kind(self, module: nn.Module) -> tuple[type, str]:
        parent, _, own = self._names[module].rpartition(".")
        return next(type(one) for one, name in self._names.items() if name == parent), own

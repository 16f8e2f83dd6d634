"""Switches: forwards that set whether parameters learn, which a trace does not see.

    for weight in self.critic.parameters(): weight.requires_grad_(False)
    score = self.critic(image)                                             through the critic, not into it
    for weight in self.critic.parameters(): weight.requires_grad_(True)

Such a module runs its own code in training. One that leaves them otherwise than they were is refused (`check_learning_stays`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowmem_pnn.capture.dispatch_modes import watching_calls

_SWITCHES = torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class Switches(TorchFunctionMode):
    """A mode that takes down which modules set whether parameters learn.

    Args:
        root: a model, or a copy of it.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in root.named_modules()}
        self._stack = [""]
        self._found: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take down what the model sets, while it runs."""

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(self._names.get(module, self._stack[-1]))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()

        with watching_calls(enter, leave), self:
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SWITCHES and isinstance(args[0], nn.Parameter):
            self._found.add(self._stack[-1])
        return func(*args, **(kwargs or {}))

    def found(self, repeats: Sequence[tuple[nn.Module, nn.Module]]) -> set[str]:
        """Return the names of the modules that set something.

        Args:
            repeats: blocks that did as others before them, with these.
        """
        found = set(self._found)
        for block, other in repeats:
            pairs = zip(block.modules(), other.modules(), strict=True)
            found |= {self._names[module] for module, one in pairs if self._names[one] in found}
        return found

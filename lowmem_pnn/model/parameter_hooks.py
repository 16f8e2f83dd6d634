"""Hooks on parameters and their gradients, and attributes set on parameters: kept for the tensors that take their place.

A parameter is another object in every residency. What its owner hung on it is read once and hung on each of these.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes in which PyTorch's modules have their hooks."""


@dataclass(frozen=True)
class ParameterHooks:
    """What hangs on one parameter.

    Args:
        on_gradient: hooks on its gradient (`register_hook`), in their order.
        after_accumulation: hooks that run once its gradient has been added up (`register_post_accumulate_grad_hook`), in their order.
        attributes: Python attributes that were set on it.
    """

    on_gradient: tuple[Callable[[Tensor], Tensor | None], ...]
    after_accumulation: tuple[Callable[[Tensor], None], ...]
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, parameter: Tensor) -> "ParameterHooks | None":
        """Return what hangs on a parameter; None where nothing does.

        Args:
            parameter: a parameter of the user's model.
        """
        hooks = cls(
            tuple((parameter._backward_hooks or {}).values()),
            tuple((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()),
            dict(vars(parameter)),
        )
        return hooks if hooks.on_gradient or hooks.after_accumulation or hooks.attributes else None

    @property
    def see_gradients(self) -> bool:
        """Whether there are hooks, and not attributes alone."""
        return bool(self.on_gradient or self.after_accumulation)

    def hang_on(self, parameter: nn.Parameter) -> None:
        """Hang all of it on a parameter that takes the place of the first one.

        Args:
            parameter: the new parameter; hooks are left out where it needs no gradient.
        """
        vars(parameter).update(self.attributes)
        if parameter.requires_grad:
            for hook in self.on_gradient:
                parameter.register_hook(hook)
            for after in self.after_accumulation:
                parameter.register_post_accumulate_grad_hook(after)


def has_forward_hooks(module: nn.Module) -> bool:
    """Decide whether hooks look at what goes into a module, or comes out of it, in a forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def num_hooks(model: nn.Module) -> Counter[str]:
    """Count the hooks on each parameter and on each module of a model, by what they hang on in words.

    Args:
        model: any module.
    """
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        kinds = "_backward_hooks", "_post_accumulate_grad_hooks"
        found[f"parameter {name!r}"] = sum(len(getattr(parameter, kind, None) or ()) for kind in kinds)
    for name, module in model.named_modules():
        found[f"module {name!r}"] = sum(len(getattr(module, kind)) for kind in MODULE_HOOKS)
    return found

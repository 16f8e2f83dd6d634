"""A model made ready for a look at it: what would change it in its first forward is done, and a compiler around it is taken off."""

import sys
from typing import Any

from torch import nn


class Uncompiled(nn.Module):
    """A model that `torch.compile` had wrapped: its tensors keep the names that they have there, and its own code runs.

    Args:
        model: the model inside.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self._orig_mod(*args, **kwargs)


def ready(model: nn.Module) -> nn.Module:
    """Return a model as training takes it.

    Models of transformers hang hooks on their modules in their first forward, by which they take down what a forward is asked for; here
    they get them at once, so that they stay the same from forward to forward.

    Args:
        model: as its constructor returns it.
    """
    if is_compiled(model):
        model = Uncompiled(model.get_submodule("_orig_mod"))
    capturing: Any = sys.modules.get("transformers.utils.output_capturing")
    if capturing is not None:
        for module in model.modules():
            if capturing._CAN_RECORD_REGISTRY.get(module) is not None:
                capturing.maybe_install_capturing_hooks(module)
    return model


def is_inside_compiled(name: str) -> bool:
    """Decide by the name of a tensor whether `torch.compile` had wrapped the model that it belongs to."""
    return name.startswith("_orig_mod.")


def is_compiled(model: nn.Module) -> bool:
    """Decide whether a model is one that `torch.compile` returned."""
    return type(model).__module__ == "torch._dynamo.eval_frame" and hasattr(model, "_orig_mod")

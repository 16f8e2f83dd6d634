"""Copies of a model's modules: over the same tensors, over others, or without values."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn.errors import CaptureError


def copy_structure(model: nn.Module, tensors: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Copy a model's modules, but none of its tensors.

    Args:
        model: any module.
        tensors: tensors of the copy by the `id` of the model's tensor that each replaces; the copy shares all others with the model.

    Raises:
        CaptureError: a module holds something that Python cannot copy.
    """
    own = [*model.parameters(), *model.buffers()]
    own += [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in own}
    memo.update(tensors or {})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the attributes of a user's modules raise
        raise CaptureError(
            f"model {type(model).__name__} cannot be copied: {first_line(error)}; keep such an object out of the modules' attributes"
        ) from error


def without_cache(model: nn.Module) -> nn.Module:
    """Return a model that keeps no keys and values of attention for tokens to come, as models of transformers do by default.

    Args:
        model: any module, which stays as it is.

    Returns:
        A copy over the same tensors with `config.use_cache` off; the model itself where nothing is kept.

    Raises:
        CaptureError: a module holds something that Python cannot copy.
    """

    def configs(root: nn.Module) -> list[Any]:
        return [config for module in root.modules() if getattr(config := vars(module).get("config"), "use_cache", None) is True]

    if not configs(model):
        return model
    copied = copy_structure(model)
    for config in configs(copied):
        config.use_cache = False
    return copied


def copy_on_meta(model: nn.Module) -> nn.Module:
    """Copy a model with tensors of the same shapes on torch's meta device.

    Args:
        model: any module.

    Raises:
        CaptureError: a module holds something that Python cannot copy.
    """
    twins: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        twin = torch.empty_like(tensor, device="meta")
        twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    return copy_structure(model, twins)


def set_mode(model: nn.Module, training: bool) -> None:
    """Bring a model into train or eval mode by its own methods, which may return anything.

    Args:
        model: the user's model, or a copy of it.
        training: whether into train mode.
    """
    if training:
        model.train()
    else:
        model.eval()


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its class where it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Model file: a model's `state_dict` in a safetensors file, loaded into a model that has the same names and shapes."""

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowmem_pnn.errors import CheckpointError, ConfigError
from lowmem_pnn.sources.imports import listed, one_line
from lowmem_pnn.stores.keys import VERSIONS_KEY

# Names of each kind of difference that a message holds.
_MOST_NAMES = 6


def load_into(model: nn.Module, file: str | Path) -> None:
    """Load weights into a model, strictly: as `model.load_state_dict(safetensors.torch.load_file(file))`.

    Versions of modules that the file holds are given to those that ask for them (torchvision's MNASNet), which `load_file` does not do.
    A model that is not of the file's form stays as it is.

    Args:
        model: The model, which is changed.
        file: Path of the file.

    Raises:
        CheckpointError: The file cannot be read, or is not of such a model: all that differs is named.
        ConfigError: It is no model, or has no memory for values.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"weights are loaded into a torch.nn.Module, and {type(model).__name__} is none; give the model")
    own = model.state_dict()
    if name := next((name for name, tensor in own.items() if isinstance(tensor, Tensor) and tensor.is_meta), None):
        raise ConfigError(
            f"{name!r} of {type(model).__name__} is on the meta device, where values get lost; build the model with values, or "
            "model.to_empty(device='cpu') first"
        )
    try:
        with safe_open(file, framework="pt") as source:
            state = OrderedDict((name, source.get_tensor(name)) for name in source.keys())  # noqa: SIM118 - it is no mapping
            versions = (source.metadata() or {}).get(VERSIONS_KEY)
        if versions:
            state._metadata = json.loads(versions)  # type: ignore[attr-defined]
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be loaded into {type(model).__name__}: {one_line(error)}") from error
    differences = _differences(own, state)
    # What matches is copied before PyTorch raises; yet a model may take names that are not its own.
    held = (*model.parameters(), *model.buffers()) if differences else ()
    before = [tensor.detach().clone() for tensor in held]
    try:
        with torch.no_grad():
            model.load_state_dict(state, strict=True)
    except (RuntimeError, ValueError) as error:
        with torch.no_grad():
            for tensor, values in zip(held, before, strict=True):
                if not torch.equal(tensor, values):
                    tensor.copy_(values)
        what = differences or one_line(error)
        raise CheckpointError(
            f"{str(file)!r} cannot be loaded into {type(model).__name__}: {what}; give the model that was trained"
        ) from error


def kept_in_fp32(file: str | Path) -> set[str]:
    """Return the names of the modules whose `weight` is in a file in float32, and in no smaller type; none where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as source:
            types = {name: source.get_slice(name).get_dtype() for name in source.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError):
        return set()
    return {name.removesuffix(".weight") for name, dtype in types.items() if dtype == "F32" and name.endswith(".weight")}


def _differences(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Return in words what the names and shapes of two states differ in."""
    missing = [repr(name) for name in own if name not in state]
    left = [repr(name) for name in state if name not in own]
    others = [
        f"{name!r} {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and isinstance(own[name], Tensor) and own[name].shape != state[name].shape
    ]
    found = (("the file lacks", missing), ("the model lacks", left), ("shapes differ:", others))
    return "; ".join(f"{words} {listed(names, _MOST_NAMES)}" for words, names in found if names)

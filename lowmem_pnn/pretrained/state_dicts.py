"""State dicts in memory: found in what a checkpoint holds, their tensors checked, and given from Python as pretrained weights."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.sources.arrays import hash_tensor
from lowmem_pnn.stores.header import TensorLayout

_KEYS = ("state_dict", "model", "model_state_dict")


class GivenTensors:
    """A `state_dict` that is in memory already.

    Args:
        state_dict: tensors by name.
    """

    where = "the state_dict that was given"

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self._tensors = tensors_of(state_dict, self.where)

    def are_there(self) -> bool:
        """Return True."""
        return True

    def layouts(self) -> Mapping[str, TensorLayout]:
        """Return element type and shape of every tensor by name."""
        return layouts_of(self._tensors, self.where)

    @contextmanager
    def reading(self, folder: Path) -> Iterator[Callable[..., Tensor]]:
        """Return a context with a function that returns one tensor, or some elements, on the CPU; nothing is made in the folder."""

        def read(name: str, elements: slice | None = None) -> Tensor:
            tensor = self._tensors[name].detach().cpu().contiguous()
            return tensor if elements is None else tensor.view(-1)[elements]

        yield read

    def sha256(self) -> str:
        """Return a hash of names and values."""
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            digest.update(name.encode())
            hash_tensor(digest, self._tensors[name].detach().cpu())
        return digest.hexdigest()


def tensors_of(found: Any, where: str) -> Mapping[str, Tensor]:
    """Return the tensors of a `state_dict`, or of the one in a checkpoint: under a usual name (`state_dict`, `model`, `model_state_dict`),
    or the only one there.

    Args:
        found: what a file held, or somebody gave.
        where: where it is from, for messages.

    Raises:
        ConfigError: it holds no tensors by name, one that is not dense, or several state_dicts none of which has a usual name.

    Example:
        >>> list(tensors_of({"best": torch.ones(()), "state_dict": {"fc.bias": torch.zeros(2)}}, "x.pt"))
        ['fc.bias']
        >>> list(tensors_of({"epoch": torch.ones(()), "net": {"fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}}, "x.pt"))
        ['fc.weight', 'fc.bias']
    """
    if isinstance(found, Mapping):
        for key in _KEYS:
            if isinstance(found.get(key), Mapping) and (tensors := _tensors(found[key]) or _tensors_below(found[key], where)):
                return tensors
        direct, below = _tensors(found), _tensors_below(found, where, more_than=len(_tensors(found)))
        if below or direct:
            return below or direct
    raise ConfigError(
        f"--weights: {where} holds a {type(found).__name__} without tensors; give a state_dict, or a dict that has one under "
        f"{', '.join(map(repr, _KEYS))}"
    )


def _tensors(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _tensors_below(found: Mapping[Any, Any], where: str, more_than: int = 0) -> dict[str, Tensor]:
    """Return the tensors of the one dictionary in another that has any, or more than that has itself; beside them may be a count of steps."""
    # A module's own state (`_extra_state`) has a name with dots.
    named = {
        str(key): value
        for key, value in found.items()
        if isinstance(value, Mapping) and "." not in str(key) and key != "_extra_state"
    }
    below = {key: tensors for key, value in named.items() if len(tensors := _tensors(value)) > more_than}
    if len(below) > 1:
        raise ConfigError(
            f"--weights: {where} holds tensors under {', '.join(map(repr, below))}; give one of them, as a state_dict of its own"
        )
    return next(iter(below.values()), {})


def layouts_of(tensors: Mapping[str, Tensor], where: str) -> Mapping[str, TensorLayout]:
    """Return element type and shape of tensors by name.

    Args:
        tensors: tensors by name; their values are not read.
        where: where they are from, for messages.

    Raises:
        ConfigError: one of them is sparse or quantized.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ConfigError(f"--weights: {name!r} of {where} is sparse or quantized; make it dense")
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

"""Equal models are cut once: another one of the same class and settings has a copy of the layers, over its own tensors."""

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.capture.equal_blocks import Identity, module_key
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.profiling.fingerprint import lasts
from lowmem_pnn.workload import assembly

# With the tensors of the model that a chain was cut from, by name.
_cut: dict[Hashable, tuple[dict[str, Tensor], Chain]] = {}


@contextmanager
def cut_once() -> Iterator[None]:
    """Have runs cut a model only where no equal one was cut before, in this process, for the same samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "capture", _capture_once)
        yield


def _capture_once(model: nn.Module, specs: Any, *settings: Any) -> Chain:
    if any(map(torch.nn.parameter.is_lazy, [*model.parameters(), *model.buffers()])):
        return capture(model, specs, *settings)  # which refuses it
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    key = _key(model, tensors), repr((specs, settings))
    if not lasts(key) or _holds_values(model):
        return capture(model, specs, *settings)
    if key not in _cut:
        chain = capture(model, specs, *settings)
        _cut[key] = tensors, copy.deepcopy(chain, {id(tensor): tensor for tensor in tensors.values()})
        return chain
    before, chain = _cut[key]
    return copy.deepcopy(chain, {id(tensor): tensors[name] for name, tensor in before.items()})


def _holds_values(model: nn.Module) -> bool:
    """Whether a module has tensors beside its parameters and buffers, of which the key has the shapes alone."""
    others = ("_parameters", "_buffers", "_modules")
    attributes = [value for module in model.modules() for name, value in vars(module).items() if name not in others]
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(attributes))


def _key(model: nn.Module, tensors: dict[str, Tensor]) -> Hashable:
    """What a capture may depend on: classes, settings, configurations of transformers, modes, tensors and their ties.

    It does not last where a setting is a function or an object of the model's own.
    """
    first: dict[int, int] = {}
    ties = tuple((name, first.setdefault(id(tensor), number)) for number, (name, tensor) in enumerate(tensors.items()))
    configs = {
        id(value): value.to_json_string()
        for module in model.modules()
        for value in vars(module).values()
        if hasattr(value, "to_json_string")
    }

    def known(key: Hashable) -> Hashable:
        if isinstance(key, tuple):
            return tuple(map(known, key))
        return configs.get(key.number, key) if isinstance(key, Identity) else key

    return known(module_key(model)), tuple(module.training for module in model.modules()), ties

"""Old names of weights in files, which the model's own loader knows: what it renames is found out by sending it tensors without values."""

import re
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.copies import copy_on_meta
from lowmem_pnn.stores.header import TensorLayout

# Modules of torchvision's DenseNet had dots in their names, which its builders take out of what they load (torchvision.models.densenet).
_DENSE_LAYER = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")


def renamed(model: nn.Module, layouts: Mapping[str, TensorLayout], wanted: Collection[str]) -> dict[str, str]:
    """Return the names that tensors of a file have in a model whose loader renames them, as torchvision's ViT and DenseNet have it.

    A module's `_load_from_state_dict`, or a hook before it, puts what it is given under other names: it is given tensors without values,
    and where they are afterwards is looked at. What it makes other tensors of stays unknown.

    Args:
        model: the model, which stays as it is.
        layouts: element type and shape of the file's tensors.
        wanted: names of the model's tensors.

    Returns:
        Names in the model by those in the file: of what has another name in the file, and is not there under its own.
    """
    old = {name: layout for name, layout in layouts.items() if name not in wanted}
    found = {name: match[1] + match[2] for name in old if (match := _DENSE_LAYER.match(name))}
    sent = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layouts.items()}
    names = {id(tensor): name for name, tensor in sent.items()}
    with suppress(CaptureError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        landed = _load(copy_on_meta(model), dict(sent), "")
        found |= {names[id(tensor)]: name for name, tensor in landed.items() if id(tensor) in names}
    return {name: own for name, own in found.items() if name in old and own in wanted and own not in layouts}


def _load(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Have modules load tensors, each those below its name as `nn.Module.load_state_dict` has it; return what each finds under its names."""
    with suppress(
        Exception
    ):  # whatever a loader does with values, which are not there; of a hook that raises the others are as they are
        module._load_from_state_dict(tensors, prefix, {}, True, [], [], [])
    own = [prefix + end for end in (*module._parameters, *module._buffers)]
    landed = {name: tensors[name] for name in own if name in tensors}
    for end, child in module._modules.items():
        if child is not None:
            below = f"{prefix}{end}."
            landed |= _load(child, {name: tensor for name, tensor in tensors.items() if name.startswith(below)}, below)
    return landed

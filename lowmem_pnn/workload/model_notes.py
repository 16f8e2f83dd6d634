"""Notes on a model: what of it does not learn, runs otherwise than it is written, or is in no file afterwards, in a line each."""

from collections.abc import Collection

from torch import nn

from lowmem_pnn.model.layer import Layer
from lowmem_pnn.pretrained.matching import shortened
from lowmem_pnn.workload.workload import Workload
from lowmem_pnn.zoo.ready_model import is_inside_compiled


def model_notes(workload: Workload) -> list[str]:
    """Return what is said of a run's model.

    Args:
        workload: Model, data and method.
    """
    return [*_idle_notes(workload), *_own_way_notes(workload), *_unsaved_notes(workload)]


def _idle_notes(workload: Workload) -> list[str]:
    """Return which parameters stay as they are, since no gradient comes to them."""
    idle = workload.bare.idle
    if not idle:
        return []
    more = f" and {len(idle) - 1} more parameters get" if len(idle) > 1 else " gets"
    return [f"{idle[0]!r}{more} no gradient, since the output does not depend on them: kept as they are, as in plain PyTorch"]


def _own_way_notes(workload: Workload) -> list[str]:
    """Return which of the model's own ways to be run are left out, and in what that differs: a compiler around it, and checkpointing."""
    notes, layers = [], workload.bare.layers
    if any(is_inside_compiled(name) for layer in layers for name in layer.parameters()):
        notes.append(
            "torch.compile around the model is taken off: its layers run as they are written, which rounds otherwise in the last bits; "
            "--compile compiles them one by one"
        )
    if any(layer.checkpoints for layer in layers):
        notes.append(
            "the model's own activation checkpointing (torch.utils.checkpoint) is left out: layers are computed again as the plan says; each "
            "forward counts once in a BatchNorm's statistics, where PyTorch's checkpointing counts twice"
        )
    return notes


def _unsaved_notes(workload: Workload) -> list[str]:
    """Return which buffers training changes that are in no `state_dict`."""
    chain = workload.bare
    moving = [name for layer in chain.layers for name in moving_tensors(layer, chain.moving)]
    lost = [name for name in dict.fromkeys(map(chain.owner_of, moving)) if name not in chain.persistent]
    if not lost:
        return []
    it = "it" if len(lost) == 1 else "them"
    return [
        f"forwards change {shortened(lost)}, and no state_dict has {it}: whatever is done with the trained model has the constructor's "
        f"values; register {it} with persistent=True"
    ]


def moving_tensors(layer: Layer, moving: Collection[str]) -> list[str]:
    """Return the parameters and buffers of a layer that a forward changes, but for BatchNorm's.

    Args:
        layer: Layer of a model.
        moving: Parameters and buffers of the model that a forward in train mode changes.
    """
    norms = [
        f"{name}.{own}"
        for name, module in layer.module.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for own, _ in module.named_buffers()
    ]
    return [name for name in (*layer.parameters(), *layer.buffers()) if name in moving and name not in norms]

"""Provenance: what the bits of a run depend on beside its options and data: another model is refused, another torch is said."""

import hashlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn import __version__
from lowmem_pnn.capture.dispatch_modes import without_addresses
from lowmem_pnn.device import Device
from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.tasks import OwnTask
from lowmem_pnn.workload import Workload

# What may change the order of sums, and so last bits, with its name in messages.
_ROUNDING = {"torch": "torch", "cpu": "kernels for", "threads": "threads:", "gpu": "a"}

_MOST_ITEMS = 100  # of a collection that a loss holds
_SETTINGS = (bool, int, float, str, type(None), tuple, Tensor, nn.Module, FunctionType, partial)  # of an object that is called
_HASHES = f"{__version__}/2"
"""Version of what the hashes are of; those of another one are not compared."""


def provenance(workload: Workload, device: Device) -> dict[str, str]:
    """Return what the bits of a run depend on beside its options and its data, by name, as the journal holds it.

    Args:
        workload: model, data and method, as they are before training.
        device: training device.

    Returns:
        `model` and `loss`: hashes of what the model's layers do, and of the code of a loss of the user's own ("" for others);
        `hooks`: hash of the code of hooks on parameters; `hashes`: version of what these are of; `device`: its kind; `torch`, `python`:
        versions; and on the CPU `cpu`: the instructions that its kernels use, and `threads`: number of threads; on a GPU `gpu`: its name.
    """
    return {
        "model": _model_hash(workload),
        "loss": _code_hash(workload.task.function) if isinstance(workload.task, OwnTask) else "",
        "hooks": _hooks_hash(workload),
        "device": device.kind,
        "hashes": _HASHES,
        "torch": torch.__version__,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        **_hardware(device),
    }


def check_provenance(began: Mapping[str, str], now: Mapping[str, str], path: Path, model: str) -> str | None:
    """Refuse to go on with another model, loss or kind of device than a run began with; return what else differs, in a line.

    With another torch or other threads a trace may do other operations, or hold other last bits; code is translated otherwise by another
    Python. Then a difference is said, and is no reason to refuse.

    Args:
        began: provenance of the run; empty for runs of earlier versions, for which nothing is known.
        now: provenance of the process that is about to go on.
        path: folder of the run, for messages.
        model: name of the model, for messages.

    Returns:
        The line; None where nothing differs.

    Raises:
        CheckpointError: model, loss or kind of device is another one.
    """
    not_comparable = set() if began.get("hashes") == now["hashes"] else {"model", "loss", "hooks", "hashes"}
    differing = {name for name in began.keys() & now.keys() - not_comparable if began[name] != now[name]}
    if "device" in differing:
        raise CheckpointError(
            f"the run in {path} began on {_device(began['device'])}, for which it was planned, and this is {_device(now['device'])}; "
            "resume it there, or begin a new run"
        )
    if "loss" in differing and not differing & {"python", "torch"}:
        raise CheckpointError(f"the loss is not the code that the run in {path} began with; bring it back, or begin a new run")
    if "hooks" in differing and not differing & {"python", "torch"}:
        raise CheckpointError(
            f"the hooks on parameters are not the code that the run in {path} began with; bring it back, or begin a new run"
        )
    changes = [f"{text} {now[name]} (before: {began[name]})" for name, text in _ROUNDING.items() if name in differing]
    if "model" in differing and not changes:
        raise CheckpointError(
            f"the model {model} does not compute what it did when the run in {path} began: its code, or a package that it is from, was "
            "changed; bring it back, or begin a new run"
        )
    if not changes:
        return None
    also = "; what the model does differs too, by these or by an edit" if "model" in differing else ""
    return f"resumed with {', '.join(changes)}; last bits may differ from those of a run that was left alone{also}"


def _hardware(device: Device) -> dict[str, str]:
    if device.torch_device.type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device.torch_device)}
    return {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads())}


def _device(kind: str) -> str:
    return {"cpu": "the CPU", "cuda": "a GPU"}.get(kind, f"a {kind} device")


def _model_hash(workload: Workload) -> str:
    """Return a hash of what each layer does to samples and weights, and of which of its parameters learn."""
    found = hashlib.sha256()
    for layer in workload.chain.layers:
        learn = {name: one.requires_grad for name, one in layer.parameters().items()}
        found.update(repr((layer.name, layer.operations, sorted(learn.items()))).encode())
    return found.hexdigest()[:16]


def _hooks_hash(workload: Workload) -> str:
    found = [
        (name, [_code_hash(hook) for hook in (*hooks.on_gradient, *hooks.after_accumulation)])
        for layer in workload.chain.layers
        for name, hooks in sorted(layer.hooks.items())
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16] if found else ""


def _code_hash(function: Callable[..., Any]) -> str:
    """Return a hash of the code of a function, or of what is called as one, and of the functions that it is wrapped in or holds.

    Of functions that it finds by their names, the names alone count.
    """
    return hashlib.sha256(repr(_code_of(function, set())).encode()).hexdigest()[:16]


def _code_of(value: Any, seen: set[int]) -> Any:
    """Return what stands for a value in a hash that is the same in every process."""
    if id(value) in seen:
        return "itself"
    seen = seen | {id(value)}
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, [_code_of(one, seen) for one in value.co_consts]
    if isinstance(value, set | frozenset):
        return sorted(repr(_code_of(one, seen)) for one in value)
    if isinstance(value, tuple | list):
        return len(value), [_code_of(one, seen) for one in value[:_MOST_ITEMS]]
    if isinstance(value, dict):
        return len(value), [(_code_of(key, seen), _code_of(one, seen)) for key, one in islice(value.items(), _MOST_ITEMS)]
    if isinstance(value, partial):
        return _code_of([value.func, value.args, value.keywords], seen)
    if isinstance(value, MethodType):
        return _code_of(value.__func__, seen)  # what its object holds may change while it trains
    if isinstance(value, nn.Parameter):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype), hashlib.sha256(repr(value.detach().cpu().tolist()).encode()).hexdigest()
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        code = value.__code__
        if value.__doc__ is not None and code.co_consts[:1] == (value.__doc__,):
            code = code.replace(co_consts=(None, *code.co_consts[1:]))
        return _code_of([code, value.__defaults__, value.__kwdefaults__, held], seen)
    if callable(value) and not isinstance(value, type | BuiltinFunctionType | MethodWrapperType | WrapperDescriptorType):
        call = getattr(type(value), "forward", None) if isinstance(value, nn.Module) else type(value).__call__
        held = [*vars(value).items()] if hasattr(value, "__dict__") else []
        if isinstance(value, nn.Module):
            held += [*value.named_buffers(recurse=False), *value.named_children()]
        settings = {name: one for name, one in held if isinstance(one, _SETTINGS) and not name.startswith("_")}
        return _code_of([type(value).__qualname__, call, settings], seen)
    return without_addresses(repr(value))

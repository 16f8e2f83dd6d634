"""Provenance: what the bits of a run depend on beside its options and data: another model is refused, another torch is said."""

import hashlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, MethodType
from typing import Any

import torch
from torch import nn

from lowmem_pnn.capture.dispatch_modes import without_addresses
from lowmem_pnn.device import Device
from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.tasks import OwnTask
from lowmem_pnn.workload import Workload

# What may change the order of sums, and so last bits.
_ROUNDING = {"torch": "torch", "cpu": "kernels for", "threads": "threads:"}


def provenance(workload: Workload, device: Device) -> dict[str, str]:
    """Return what the bits of a run depend on beside its options and its data, by name, as the journal holds it.

    Args:
        workload: model, data and method, as they are before training.
        device: training device.

    Returns:
        `model` and `loss`: hashes of what the model's layers do, and of the code of a loss of the user's own ("" for others);
        `device`: its kind; `torch`, `python`: versions; `cpu`: the instructions that its kernels use; `threads`: number of threads.
    """
    return {
        "model": _model_hash(workload),
        "loss": _code_hash(workload.task.function) if isinstance(workload.task, OwnTask) else "",
        "device": device.kind,
        "torch": torch.__version__,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "cpu": _capability(),
        "threads": str(torch.get_num_threads()),
    }


def check_provenance(began: Mapping[str, str], now: Mapping[str, str], path: Path, model: str) -> str | None:
    """Refuse to go on with another model, loss or kind of device than a run began with; return what else differs, in a line.

    A trace may do other operations with another torch, and code is translated otherwise by another Python: nothing is compared then.

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
    differing = [name for name in began if began[name] != now.get(name)]
    if "device" in differing:
        raise CheckpointError(
            f"the run in {path} began on {_device(began['device'])}, for which it was planned, and this is {_device(now['device'])}; "
            f"resume it there, or begin a new run with --weights {path}"
        )
    same_tools = not {"torch", "cpu"} & set(differing)
    if "model" in differing and same_tools:
        raise CheckpointError(
            f"the model {model} does not compute what it did when the run in {path} began; bring it back, or begin a new run"
        )
    if "loss" in differing and "python" not in differing:
        raise CheckpointError(f"the loss is not the code that the run in {path} began with; bring it back, or begin a new run")
    changes = [f"{text} {now[name]} (before: {began[name]})" for name, text in _ROUNDING.items() if name in differing]
    if not changes:
        return None
    return f"resumed with {', '.join(changes)}; last bits may differ from those of a run that was left alone"


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _device(kind: str) -> str:
    return {"cpu": "the CPU", "cuda": "a GPU"}.get(kind, f"a {kind} device")


def _model_hash(workload: Workload) -> str:
    """Return a hash of what each layer does to samples and weights, and of which of its parameters learn."""
    found = hashlib.sha256()
    for layer in workload.chain.layers:
        learn = {name: one.requires_grad for name, one in layer.parameters().items()}
        found.update(repr((layer.name, layer.operations, sorted(learn.items()))).encode())
    return found.hexdigest()[:16]


def _code_hash(function: Callable[..., Any]) -> str:
    """Return a hash of the code of a function, or of what is called as one; of what it calls in turn, the names alone."""
    return hashlib.sha256(repr(_code_of(function)).encode()).hexdigest()[:16]


def _code_of(value: Any) -> Any:
    if isinstance(value, partial):
        return _code_of(value.func), _plain((value.args, sorted(value.keywords.items())))
    if isinstance(value, MethodType):
        return _code_of(value.__func__)
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, tuple(map(_code_of, value.co_consts))
    if code := getattr(value, "__code__", None):
        held = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        return _code_of(code), _plain((getattr(value, "__defaults__", None), held))
    if isinstance(value, nn.Module):
        return _plain(value), _code_of(type(value).forward)
    if callable(value) and not isinstance(value, type):
        call = type(value).__call__
        return type(value).__qualname__, _code_of(call) if hasattr(call, "__code__") else None
    return _plain(value)


def _plain(value: Any) -> str:
    return without_addresses(repr(value))

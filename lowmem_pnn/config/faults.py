"""Faults in options, in the words of the command line."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from lowmem_pnn.errors import UnitError


def flag(name: str, *, off: bool = False) -> str:
    """Return the command line's name of a field: `--max-gpu-mem` for `max_gpu_mem`.

    Args:
        name: the field.
        off: whether the name is that which turns a switch off.

    Example:
        >>> flag("fused"), flag("fused", off=True), flag("no_decay_norms", off=True)
        ('--fused', '--no-fused', '--decay-norms')
    """
    if off:
        name = name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"
    return "--" + name.replace("_", "-")


# What other programs call an option, and what it is called here.
SYNONYMS = {
    "batch": "batch_size", "bs": "batch_size", "budget": "max_gpu_mem", "checkpoint": "weights", "dataset": "data", "epoch": "epochs",
    "gpu_mem": "max_gpu_mem", "gpus": "device", "init_from": "weights", "learning_rate": "lr", "max_epochs": "epochs",
    "max_mem": "max_gpu_mem", "max_memory": "max_gpu_mem", "mem": "max_gpu_mem", "memory": "max_gpu_mem", "net": "model",
    "num_epochs": "epochs", "num_workers": "workers", "output": "workdir", "output_dir": "workdir", "patience": "early_stop",
    "pretrained": "weights", "scheduler": "lr_schedule", "val": "val_data", "wd": "weight_decay",
}  # fmt: skip


def suggest(word: str, known: Sequence[str]) -> str:
    """Return a tail for an error message: `; did you mean 'x'?`, or nothing if no known word is near.

    Example:
        >>> suggest("learning_rate", ["lr", "epochs"]), suggest("epohs", ["lr", "epochs"]), suggest("x", ["epochs"])
        ("; did you mean 'lr'?", "; did you mean 'epochs'?", '')
    """
    synonym = SYNONYMS.get(word.lower().replace("-", "_"))
    near = [synonym] if synonym in known else difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# Characters of a value that an error shows.
_LONGEST_SHOWN = 120


def describe_fault(fault: Any, known: Sequence[str]) -> str:
    """Say one of pydantic's faults in the words of the command line.

    Args:
        fault: one of `ValidationError.errors()`.
        known: names of all options.
    """
    name = str(fault["loc"][0])
    value = fault.get("input")
    if fault["type"] == "missing":
        if name in ("model", "data"):
            example, command = {"model": ("mlp:64-256-10", "models"), "data": ("digits", "data")}[name]
            return f"{flag(name)} is missing; give {flag(name)} {example}, or what else lowmem-pnn {command} lists"
        return f"{flag(name)} is missing; give {flag(name)} 2GB"
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"there is no option {flag(name)}{suggest(name, known)}"
    if fault["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
        return f"{flag(name)} {_shown(value)} is none of {', '.join(choices)}{suggest(str(value), choices)}"
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, UnitError):
        return f"{flag(name)}: {cause}"
    if name == "device":
        others = str(value).lower().partition(":")[0] in ("mps", "xpu", "rocm", "hip", "tpu", "xla")
        near = (
            "; did you mean 'cuda'?" if str(value).lower() in ("gpu", "nvidia") else suggest(str(value), ["auto", "cpu", "cuda"])
        )
        tail = "; only NVIDIA's GPUs and the CPU are supported" if others else near
        return f"--device {_shown(value)} is none of auto, cpu, cuda, cuda:INDEX{tail}"
    if fault["type"] == "bool_parsing":
        return f"{flag(name)} {_shown(value)} is none of yes, no"
    if fault["type"] == "too_short":
        return f"{flag(name)} {_shown(value)} is empty; give one value, or one per partition"
    message = str(fault["msg"]).replace("Input should be", "must be").replace("Value error, ", "")
    return f"{flag(name)} {_shown(value)}: {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    """Return a value as an error shows it: what is no plain value by its type, or an error would be as long as a data set."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN and "\n" not in text else f"(a {type(value).__name__})"


def as_typed(value: Any) -> str:
    """Return a value as one would type it on the command line.

    Example:
        >>> as_typed((5, 160)), as_typed(True), as_typed(None), as_typed(2.3456789e-05), as_typed(60.0)
        ('5,160', 'yes', '(not given)', '2.3456789e-05', '60')
    """
    if isinstance(value, tuple):
        return ",".join(map(as_typed, value))
    if isinstance(value, dict):
        return " ".join(f"{key}={as_typed(item)}" for key, item in value.items()) or "(not given)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")  # all digits: what is typed again is the same number
    return "(not given)" if value is None else str(value)

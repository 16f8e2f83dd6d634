"""The command that begins a run with given options."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowmem_pnn.config.data_options import columns_text
from lowmem_pnn.config.defaults import unasked_method
from lowmem_pnn.config.faults import as_typed, flag
from lowmem_pnn.config.field_types import SIZES
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.settings.config_file import NOTHING, needed_options
from lowmem_pnn.settings.model_arguments import argument_text
from lowmem_pnn.units import exact_seconds, exact_size, format_bytes

# Where the run was, not what it was.
_LEFT_OUT = ("data_root",)


def fit_command(config: FitConfig) -> str:
    """Return the command that begins a run with these options, those left out that are as by default.

    Args:
        config: options of the run.

    Example:
        >>> fit_command(FitConfig(max_gpu_mem="1GB", model="mlp:64-10", data="digits", epochs=3, compare=False))
        'lowmem-pnn fit --max-gpu-mem 1GB --model mlp:64-10 --data digits --method pnn --epochs 3 --no-compare'
    """
    return shlex.join(["lowmem-pnn", "fit", *option_words(config)])


def option_words(config: FitConfig) -> list[str]:
    """Return options as a command line takes them, those left out that are as by default.

    Args:
        config: options of the run.
    """
    words: list[str] = []
    for name in needed_options(config):
        value = getattr(config, name)
        if name in _LEFT_OUT:
            continue
        if value is None:
            words += [flag(name), str(NOTHING[name])]
            continue
        if isinstance(value, bool):
            words.append(flag(name, off=not value))
        elif name == "sample":
            words += [part for text in value for part in (flag(name), text)]
        elif isinstance(value, Mapping):
            text = argument_text if name == "model_arg" else as_typed
            words += [part for key, each in value.items() for part in (flag(name), f"{key}={text(each)}")]
        else:
            words += [flag(name), _typed(name, value)]
    return words


def _typed(name: str, value: Any) -> str:
    if name in SIZES:
        return exact_size(value)
    if name == "target":
        return columns_text(value)
    return exact_seconds(value) if name == "time_limit" else as_typed(value)


def describe_command(config: FitConfig | None, workdir: Path, given: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the first lines of a command: what is asked, the budget as it was understood, the run's folder, and a method by default.

    Args:
        config: options of the run; None where it is gone on with.
        workdir: folder of the run.
        given: options that were given.

    Example:
        >>> describe_command(FitConfig(max_gpu_mem="1.5G", model="mlp:64-10", data="digits"), Path("runs/one"))
        'fit mlp:64-10 on digits by pnn, in 1.50 GB; the run is in runs/one'
    """
    if config is None:
        return f"going on with the run in {workdir}"
    begun = (
        f"fit {config.model} on {config.data} by {config.method}, in {format_bytes(config.max_gpu_mem)}; the run is in {workdir}"
    )
    note = unasked_method(config, given)
    return begun if note is None else f"{begun}\n{note}"

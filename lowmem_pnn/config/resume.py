"""The configuration that a run is resumed with: the one that it began with, and what may be given anew."""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_pnn.config.checks import of_fixed_length
from lowmem_pnn.config.code import CODE_FIELDS, command_to_resume, names_code
from lowmem_pnn.config.configure import checked, given_options
from lowmem_pnn.config.faults import as_typed, flag
from lowmem_pnn.config.fit_config import FitConfig, field_names
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.units import format_bytes

FREE_TO_DIFFER = (
    "commit_every", "keep_commits", "log_every", "max_disk", "drive_tbw", "compare", "workers", "time_limit", "logger", "host_tier",
    "max_host_mem", "data_root",
)  # fmt: skip
"""Options that change nothing in a run's result."""

PLACES = ("data", "val_data", "test_data", "model", "weights", "tokenizer", "loss")
"""Options that name a file or folder, which may have moved."""

_SIZES = ("max_gpu_mem", "max_host_mem")


def resumed_config(stored: FitConfig, options: Mapping[str, Any], where: Path) -> FitConfig:
    """Return the configuration that a run goes on with.

    Args:
        stored: options that the run began with.
        options: fields of `FitConfig` that are given now; None means not given. Those that change nothing in the result replace the
            stored ones.
        where: folder of the run, for the message.

    Raises:
        ConfigError: an option that would change the result differs, or is no such option.

    Example:
        >>> stored = FitConfig(max_gpu_mem="1GB", model="mlp:64-10", data="digits")
        >>> resumed_config(stored, {"epochs": 10, "commit_every": 5}, Path("runs/a")).commit_every
        5.0
    """
    config = checked({**_values(stored), **given_options(options)})
    differing = [name for name in _differing(config, stored) if not _has_moved(name, config, stored)]
    if "epochs" not in differing:
        config = dataclasses.replace(config, epochs=stored.epochs)
    if "epochs" in differing and len(config.epochs) == len(stored.epochs) == 1 and config.epochs[0] > stored.epochs[0]:
        check_longer(stored, config.epochs[0])
        differing.remove("epochs")
    if differing:
        texts = [_texts(name, getattr(stored, name), getattr(config, name)) for name in differing]
        began = ", ".join(f"{flag(name)} {before}" for name, (before, _) in zip(differing, texts, strict=True))
        given = ", ".join(f"{flag(name)} {now}" for name, (_, now) in zip(differing, texts, strict=True))
        many = len(differing) > 1
        raise ConfigError(
            f"the run in {where} began with {began}, and {given} {'are' if many else 'is'} given now; leave {'them' if many else 'it'} "
            "out to resume the run, or begin a new one"
        )
    return config


def check_longer(stored: FitConfig, epochs: int) -> None:
    """Refuse to train for more epochs than a run began with where it would not end as one that began with so many.

    Args:
        stored: options that the run began with.
        epochs: epochs that are asked for now.

    Raises:
        ConfigError: it would not, and why.

    Example:
        >>> stored = FitConfig(max_gpu_mem="1GB", model="mlp:64-10", data="digits", method="exact", lr_schedule="cosine")
        >>> check_longer(stored, 20)
        Traceback (most recent call last):
        lowmem_pnn.errors.ConfigError: --epochs 20: the run began with --lr-schedule cosine over 10 epochs; begin a new run
    """
    before = f"--epochs {epochs}: "
    if stored.method not in ("exact", "backprop"):
        raise ConfigError(
            f"{before}partitions of --method {stored.method} learn one after the other, and later ones have learnt from what earlier ones "
            "were then; begin a new run, or take --method exact"
        )
    if (fixed := of_fixed_length(stored)) is not None:
        over = f" over {stored.epochs[0]} epochs" if stored.lr_schedule != "constant" else ""
        raise ConfigError(f"{before}the run began with {fixed}{over}; begin a new run")


def raised(config: FitConfig, journal: Mapping[str, Any]) -> FitConfig:
    """Return the options of a run with the epochs that a resume has raised them to, and the places that things have moved to.

    Args:
        config: options that the run began with.
        journal: body of its journal.
    """
    moved = journal.get("moved")
    if isinstance(moved, dict) and moved:
        places: dict[str, Any] = {name: spec for name, spec in moved.items() if name in PLACES and isinstance(spec, str)}
        config = dataclasses.replace(config, **places)
    epochs = journal.get("epochs")
    if isinstance(epochs, int) and len(config.epochs) == 1 and epochs > config.epochs[0]:
        return dataclasses.replace(config, epochs=(epochs,))
    return config


def with_new_modules(config: FitConfig, weights: Mapping[str, Any]) -> FitConfig:
    """Return the options of a run with the modules that have learnt whole beside adapters since no pretrained values were there for them.

    Args:
        config: options that the run began with.
        weights: what the run says of its pretrained weights; empty where it has none.

    Example:
        >>> config = FitConfig(max_gpu_mem="1GB", model="resnet18", data="cifar10", lora="r=8", weights="default")
        >>> with_new_modules(config, {"new": ["fc.weight (10, 512)", "fc.bias (10,)"]}).modules_to_save
        ('fc',)
    """
    new = weights.get("new")
    if config.lora is None or config.modules_to_save is not None or not new:
        return config
    modules = dict.fromkeys(str(one).partition(" ")[0].rpartition(".")[0] for one in new)
    return dataclasses.replace(config, modules_to_save=tuple(name for name in modules if name) or None)


def check_trust(config: FitConfig, options: Mapping[str, Any], where: Path, *, trust: bool, again: bool = True) -> None:
    """Refuse to run code that a run names, and that whoever goes on with it did not.

    Args:
        config: options that the run began with.
        options: fields of `FitConfig` that were given now; None means not given.
        where: folder of the run, for the message.
        trust: whether code is run that only the run names.
        again: whether model and data can be named again, for the message.

    Raises:
        ConfigError: model or data is built by code that was not named now.

    Example:
        >>> check_trust(FitConfig(max_gpu_mem="1GB", model="net.py:build", data="digits"), {}, Path("runs/a"), trust=False)
        Traceback (most recent call last):
        lowmem_pnn.errors.ConfigError: the run in runs/a would run code from net.py:build; give --model net.py:build again, or --trust
    """
    if trust:
        return
    code = [(name, getattr(config, name)) for name in CODE_FIELDS if options.get(name) is None]
    named = [(name, spec) for name, spec in code if names_code(name, spec)]
    if named:
        specs = " and ".join(spec for _, spec in named)
        naming = f"{' '.join(f'{flag(name)} {shlex.quote(spec)}' for name, spec in named)} again, or "
        raise ConfigError(f"the run in {where} would run code from {specs}; give {naming if again else ''}--trust")


def resume_command(config: FitConfig, where: Path) -> str:
    """Return the command that goes on with a run, for messages.

    Args:
        config: options of the run.
        where: folder of the run.

    Example:
        >>> resume_command(FitConfig(max_gpu_mem="1GB", model="net.py:build", data="digits"), Path("runs/a"))
        'lowmem-pnn fit --resume --workdir runs/a --trust'
    """
    return command_to_resume(vars(config), where)


def began_alike(config: FitConfig, stored: FitConfig) -> bool:
    """Return whether a run began with the options of another command, but for those that change nothing in its result.

    Args:
        config: options of the command.
        stored: options that the run began with.
    """
    return all(_has_moved(name, config, stored) for name in _differing(config, stored))


def _differing(config: FitConfig, stored: FitConfig) -> list[str]:
    names = (name for name in field_names() if name not in FREE_TO_DIFFER)
    differing = [name for name in names if getattr(config, name) != getattr(stored, name)]
    return [name for name in differing if name != "epochs" or not _ends_at_the_same_step(config, stored)]


def _has_moved(name: str, config: FitConfig, stored: FitConfig) -> bool:
    """Return whether an option names the same file or folder in another place, and the one before is gone; what is in it is compared later."""
    before, now = getattr(stored, name), getattr(config, name)
    if name not in PLACES or not isinstance(before, str) or not isinstance(now, str):
        return False
    (kind, old), (other_kind, new) = _place_of(before), _place_of(now)
    return kind == other_kind and old.is_absolute() and old.name == new.name and new.exists() and not old.exists()


def _place_of(spec: str) -> tuple[str, Path]:
    """Return what is beside a path in what an option names, as `npz` or the function of a file, and the path."""
    first, _, second = spec.partition(":")
    return (second, Path(first)) if "/" in first or first.endswith(".py") else (first if second else "", Path(second or first))


def _ends_at_the_same_step(config: FitConfig, stored: FitConfig) -> bool:
    """Return whether `--max-steps` ends training before more epochs would: runs of earlier versions have stored the epochs up to that step."""
    is_one_step = config.max_steps is not None and config.max_steps == stored.max_steps
    return is_one_step and len(config.epochs) == len(stored.epochs) == 1 and config.epochs > stored.epochs


def _values(config: FitConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _texts(name: str, before: Any, now: Any) -> tuple[str, str]:
    """Return both values of an option as one would type them; sizes to the byte where rounding would make them look the same."""
    if name not in _SIZES or before is None or now is None:
        return as_typed(before), as_typed(now)
    rounded = format_bytes(before).replace(" ", ""), format_bytes(now).replace(" ", "")
    return rounded if rounded[0] != rounded[1] else (str(before), str(now))

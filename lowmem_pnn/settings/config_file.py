"""Configuration files: options in TOML, read for a command, and written so that a command repeats a run."""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lowmem_pnn.config.configure import configure, faults_of
from lowmem_pnn.config.faults import suggest
from lowmem_pnn.config.field_types import SIZES, argument_as_json, argument_as_literal
from lowmem_pnn.config.fit_config import FitConfig, default_of, field_names
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.settings.model_arguments import parse_model_arguments
from lowmem_pnn.units import exact_size

tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

CONFIG_FILE = "config.toml"
"""Name of the file in a run's folder that repeats the run."""

# TOML has no null, which a model's factory may take; a command line says it by the same word.
_NONE = "None"
_ALWAYS = ("max_gpu_mem", "model", "data", "method")
# Options whose defaults depend on others.
_DEPENDING = ("epochs", "lr", "lr_schedule", "weight_decay", "clip_norm")
# Options of which a command line takes several.
_REPEATED = ("lr_for", "sample")
NOTHING: Mapping[str, Any] = {"clip_norm": 0, "weights": "none"}
"""What is given where an option that has a default is to have no value."""


def read_config_file(path: Path) -> dict[str, Any]:
    """Read options from a file.

    Args:
        path: TOML with names of options as keys, with underscores or dashes; what a model's factory is given is in a table `model_arg`.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has keys that are no options: all of them are named, and values that are none.
    """
    try:
        with path.open("rb") as file:  # TOML is UTF-8, whatever the locale's encoding is
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {(error.strerror or str(error)).lower()}; give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}; write, for example, epochs = 5") from None
    given = _known({name.replace("-", "_"): value for name, value in content.items()}, f"--config {path}")
    if isinstance(arguments := given.get("model_arg"), Mapping):
        given["model_arg"] = {name: None if value == _NONE else value for name, value in arguments.items()}
    return given


def read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Read options from texts KEY=VALUE; KEY is `model_arg.NAME` for an argument of a model's factory.

    Args:
        settings: the texts; of those with the same key the last one counts, but all of an option that may be repeated.

    Raises:
        ConfigError: a text has no `=`, or a key is no option: all of them are named.

    Example:
        >>> read_settings(["epochs=5,160", "model_arg.width=0.25"])
        {'epochs': '5,160', 'model_arg': {'width': 0.25}}
    """
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        name, dot, argument = key.strip().replace("-", "_").partition(".")
        if not equals:
            raise ConfigError(f"--set {setting!r} is not KEY=VALUE; write, for example, --set epochs=5")
        if name == "model_arg" and not argument:
            raise ConfigError(f"--set {setting!r} has no name of an argument; write, for example, --set model_arg.width=64")
        if name in _REPEATED and not dot:
            given[name] = [*given.get(name, ()), value]
        elif name == "model_arg":
            given["model_arg"] = {**given.get("model_arg", {}), **parse_model_arguments([f"{argument}={value}"])}
        else:
            given[f"{name}{dot}{argument}"] = value
    return _known(given, "--set")


def _known(given: dict[str, Any], where: str) -> dict[str, Any]:
    unknown = [name for name in given if name not in field_names()]
    if unknown:
        texts = [f"there is no option {name}{suggest(name, field_names())}" for name in unknown]
        texts += faults_of({name: value for name, value in given.items() if name not in unknown})
        raise ConfigError(f"{where}: {'; '.join(texts)}")
    return given


def to_toml(config: FitConfig) -> str:
    """Return options as TOML which makes the same configuration again; those that are as by default are left out.

    Args:
        config: options of a run.

    Example:
        >>> print(to_toml(configure(max_gpu_mem="1GB", model="mlp:64-10", data="digits", epochs="5,160", kappa=3)))
        max_gpu_mem = "1GB"
        model = "mlp:64-10"
        data = "digits"
        method = "pnn"
        epochs = [5, 160]
        kappa = [3.0]
        <BLANKLINE>
    """
    values = TypeAdapter(FitConfig).dump_python(config, mode="json")
    names = needed_options(config)
    flat = [name for name in names if not isinstance(values[name], Mapping)]
    values |= {name: exact_size(values[name]) for name in flat if name in SIZES}
    values |= {name: NOTHING[name] for name in flat if values[name] is None}
    lines = [f"{name} = {_value(values[name])}" for name in flat]
    values["model_arg"] = {name: _argument(value) for name, value in config.model_arg.items()}
    for name in (name for name in names if isinstance(values[name], Mapping)):
        lines += ["", f"[{name}]", *(f"{json.dumps(key)} = {_value(value)}" for key, value in values[name].items())]
    return "\n".join(lines) + "\n"


def needed_options(config: FitConfig) -> list[str]:
    """Return the options that have to be given to make a configuration again: others than the defaults, which depend on what is trained.

    Args:
        config: options of a run.
    """
    names = list(_ALWAYS)
    # Where data lie may be said only of data to which it matters: it comes last, if at all.
    candidates = [name for name in field_names() if _given(config, name) is not None and name != "data_root"]
    # Twice: what is given decides which defaults the others have.
    for _ in range(2):
        made, more = _configured(config, names), [name for name in candidates if name not in names]
        if made is not None:
            names += [name for name in more if getattr(made, name) != getattr(config, name)]
        else:  # these few are refused by themselves: all that may matter is named, and what does not is left out below
            names += [name for name in more if name in _DEPENDING or getattr(config, name) != default_of(name)]
    if "data_root" not in names and _configured(config, [*names, "data_root"]) is not None:
        names.append("data_root")
    for name in [name for name in names if name not in (*_ALWAYS, "data_root")]:
        others = [other for other in names if other != name]
        made = _configured(config, others)
        if made is not None and all(
            getattr(made, each) == getattr(config, each) for each in field_names() if each != "data_root"
        ):
            names = others
    return names


def _configured(config: FitConfig, names: Sequence[str]) -> FitConfig | None:
    """Return the configuration that some of the options make; None where they make none."""
    with suppress(ConfigError):
        return configure(**{name: _given(config, name) for name in names})
    return None


def _given(config: FitConfig, name: str) -> Any:
    """Return an option as one would give it; None where it is not given."""
    value = getattr(config, name)
    return NOTHING.get(name) if value is None else value


def _argument(value: Any) -> Any:
    """Return an argument of a model's factory as TOML holds it: None alone as its word, and as a literal what that word would be read in."""
    return argument_as_literal(value) if value is not None and _NONE in repr(value) else argument_as_json(value)


def _value(value: Any) -> str:
    if value is None:
        return json.dumps(_NONE)
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{json.dumps(str(key))} = {_value(each)}' for key, each in value.items())}}}"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)

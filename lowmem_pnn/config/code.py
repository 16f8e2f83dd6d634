"""Code that a configuration names: factories of models and data, and losses, which are imported. No imports of ours: the supervisor reads it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CODE_FIELDS = ("model", "data", "val_data", "test_data", "loss")
"""Fields of `FitConfig` that may name code."""

DATA_FIELDS = ("data", "val_data", "test_data")
"""Those of them that name data."""

OBJECT_FIELDS = (*CODE_FIELDS, "weights")
"""Fields of `FitConfig` that stand for an object where one was given from Python."""

# What stands before the colon where no code is named.
_DATA = ("npz", "imagefolder", "text", "jsonl", "tokens", "csv", "parquet", "segmentation", "hfdata", "python")
BUILT_IN = {
    "model": ("mlp", "gpt", "timm", "hf", "python"),
    "data": _DATA,
    "val_data": _DATA,
    "test_data": _DATA,
    "loss": ("python",),
}
"""What stands before the colon where no code is named, by field."""


def names_code(field: str, spec: str | None) -> bool:
    """Decide whether a model, data or a loss is a user's code, which is imported for it.

    Args:
        field: one of `CODE_FIELDS`.
        spec: its text, as the option has it; None where it is not given.

    Example:
        >>> names_code("model", "net.py:build"), names_code("model", "mlp:64-10"), names_code("data", "npz:x.npz")
        (True, False, False)
    """
    return spec is not None and ":" in spec and spec.partition(":")[0] not in BUILT_IN[field]


def python_objects(options: Mapping[str, Any], fields: Sequence[str] = OBJECT_FIELDS) -> list[str]:
    """Return what a run was given from Python as objects, which no command can name: "python:" and the name of the class or function of each.

    Args:
        options: fields of `FitConfig`.
        fields: those that are looked at.

    Example:
        >>> python_objects({"model": "python:Net", "data": "digits", "val_data": None})
        ['python:Net']
    """
    specs = dict.fromkeys(options.get(field) for field in fields)
    return [spec for spec in specs if isinstance(spec, str) and spec.startswith("python:")]


def trust_words(options: Mapping[str, Any], fields: Sequence[str] = CODE_FIELDS) -> list[str]:
    """Return what a command needs that runs the code of a run: `--trust`, or nothing where there is none.

    Args:
        options: fields of `FitConfig`.
        fields: those of `CODE_FIELDS` whose code it runs.

    Example:
        >>> trust_words({"model": "mlp:64-10", "val_data": "it.py:data"}), trust_words({"model": "mlp:64-10", "data": "digits"})
        (['--trust'], [])
    """
    specs = {field: options.get(field) for field in fields}
    return ["--trust"] if any(isinstance(spec, str) and names_code(field, spec) for field, spec in specs.items()) else []


def command_to_resume(options: Mapping[str, Any], where: Path) -> str:
    """Return the command that goes on with a run, for messages; the call in Python, where the run was given objects.

    Args:
        options: fields of `FitConfig` that the run began with.
        where: folder of the run.

    Example:
        >>> command_to_resume({"model": "net.py:build", "data": "digits"}, Path("runs/a"))
        'lowmem-pnn fit --resume --workdir runs/a --trust'
        >>> command_to_resume({"model": "python:Net", "data": "digits"}, Path("runs/a"))
        "lowmem_pnn.fit(..., workdir='runs/a', resume=True)"
    """
    if python_objects(options):
        return f"lowmem_pnn.fit(..., workdir={str(where)!r}, resume=True)"
    return shlex.join(["lowmem-pnn", "fit", "--resume", "--workdir", str(where), *trust_words(options)])

"""Writes `lowmem_pnn/settings/fit_options.py`: the options of `fit` and `plan` as types, for editors and type checkers, from `FitConfig`.

python docs/fit_options.py   # a test says whether it is up to date
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from lowmem_pnn.config.field_types import SIZES
from lowmem_pnn.config.fit_config import FitConfig

TARGET = Path(__file__).parents[1] / "lowmem_pnn" / "settings" / "fit_options.py"
# Parameters of the functions themselves.
_OWN = ("max_gpu_mem", "model", "data", "loss", "weights")
# What options take from Python whose readers take more than the type of their field.
_READ = {
    "class_weights": ["str", "Iterable[Any]"],
    "image_size": ["int", "str", "Sequence[int]"],
    "lora": ["str", "Mapping[str, Any]"],
    "lr_for": ["str", "Sequence[str]", "Mapping[str, float]"],
    "normalize": ["str", "Sequence[float | Sequence[float]]"],
    "time_limit": ["str", "float"],
    "tokenizer": ["str", "Path"],
}
_HEAD = '''"""Options of `fit` and `plan` as types, for editors and type checkers: written by docs/fit_options.py from `FitConfig`."""

# ruff: noqa: E501
# fmt: off
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict


class FitOptions(TypedDict, total=False):
    """Options of `fit` and `plan`: fields of `FitConfig`, whose descriptions `lowmem-pnn fit --help-all` shows; None is not given."""

'''


def text_of(kind: Any) -> list[str]:
    """Return what a field of such a type takes from Python, as the parts of a union."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return text_of(arguments[0])
    if kind is type(None):
        return ["None"]
    if origin in (typing.Union, types.UnionType):
        return [part for argument in arguments for part in text_of(argument)]
    if origin is Literal:
        return [f"Literal[{', '.join(repr(argument).replace(chr(39), chr(34)) for argument in arguments)}]"]
    if origin is tuple:
        elements = [*text_of(arguments[0]), *(["int"] if arguments[0] is str else [])]
        return ["str", *elements, f"Sequence[{' | '.join(dict.fromkeys(elements))}]"]
    if origin in (dict, Mapping) or kind is dict:
        return ["Mapping[str, Any]"]
    if kind in (int, float, bool, str):
        return [kind.__name__]
    return ["str", "Path"] if kind is Path else ["Any"]


def module_text() -> str:
    """Return the text of the module."""
    hints = typing.get_type_hints(FitConfig, include_extras=True)
    lines = []
    for field in dataclasses.fields(FitConfig):
        if field.name in _OWN:
            continue
        parts = ["int", "str"] if field.name in SIZES else _READ.get(field.name) or text_of(hints[field.name])
        parts = [*(part for part in dict.fromkeys(parts) if part != "None"), "None"]
        lines.append(f"    {field.name}: {'Any' if 'Any' in parts else ' | '.join(parts)}")
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(module_text())

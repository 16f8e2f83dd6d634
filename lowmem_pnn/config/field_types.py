"""Types of the options: how each reads what a command line or a call gives, and what it refuses."""

import ast
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, PositiveInt

from lowmem_pnn.errors import UnitError
from lowmem_pnn.units import parse_bytes


def _size(value: Any) -> Any:
    # pydantic collects ValueErrors, and UnitError is one.
    if isinstance(value, float):
        raise UnitError(f"{value!r} has no unit; write it as text, '{value:g}GB', or as a whole number of bytes")
    if isinstance(value, bool):
        raise UnitError(f"{value} is no size; write 512MB or 512MiB")
    return parse_bytes(value) if isinstance(value, str | int) else value


def _list(value: Any) -> Any:
    """A comma list, one value, or a sequence, as a tuple."""
    if isinstance(value, str):
        parts = tuple(part.strip() for part in value.split(","))
        if not all(parts):
            raise ValueError("there is nothing between two commas, or nothing at all; write one value, or several as A,B")
        return parts
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _layer_names(value: Any) -> Any:
    return None if value is None else tuple(str(part) for part in _list(value))


def _numbers_or_all(value: Any) -> Any:
    return value if value in (None, "all") else _list(value)


SIZES = ("max_gpu_mem", "max_host_mem", "max_disk")
"""Options that are sizes in bytes."""

Size = Annotated[PositiveInt, BeforeValidator(_size)]


Batches = Annotated[
    tuple[PositiveInt, ...] | Literal["auto"], BeforeValidator(lambda value: value if value == "auto" else _list(value))
]


Counts = Annotated[tuple[PositiveInt, ...], BeforeValidator(_list), Field(min_length=1)]


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _clip(value: Any) -> Any:
    """None where a number is 0, as one may write it."""
    with suppress(TypeError, ValueError):
        return None if float(value) == 0 else value
    return value


Clip = Annotated[Positive | None, BeforeValidator(_clip)]


Flags = Annotated[tuple[bool, ...], BeforeValidator(_list), Field(min_length=1)]


Optimizers = Annotated[
    tuple[Literal["sgd", "adam", "adamw"], ...],
    BeforeValidator(lambda value: tuple(each.lower() if isinstance(each, str) else each for each in _list(value))),
    Field(min_length=1),
]


LearningRates = Annotated[tuple[Positive, ...], BeforeValidator(_list), Field(min_length=1)]


Layers = Annotated[tuple[str, ...] | None, BeforeValidator(_layer_names)]


Recovering = Annotated[tuple[PositiveInt, ...] | Literal["all"] | None, BeforeValidator(_numbers_or_all)]


DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


# Key of a mapping that stands for the value of the literal in it.
_LITERAL = "python literal"


def argument_as_json(value: Any) -> Any:
    """Return an argument of a model's factory as JSON holds it: as a literal, where JSON would give something else back.

    Args:
        value: what a Python literal stands for.

    Example:
        >>> argument_as_json([1, None]), argument_as_json((1, 2))
        ([1, None], {'python literal': '(1, 2)'})
    """
    with suppress(TypeError, ValueError):
        if repr(json.loads(json.dumps(value))) == repr(value):
            return value
    return argument_as_literal(value)


def argument_as_literal(value: Any) -> dict[str, str]:
    """Return an argument of a model's factory as a literal in a mapping, which the option reads as the value.

    Args:
        value: what a Python literal stands for.
    """
    return {_LITERAL: repr(value)}


def _arguments(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value  # refused by its type
    return {name: _argument(str(name), each) for name, each in value.items()}


def _argument(name: str, value: Any) -> Any:
    is_literal = isinstance(value, Mapping) and set(value) == {_LITERAL}
    # Errors that literal_eval documents.
    with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        read = ast.literal_eval(value[_LITERAL] if is_literal else repr(value))
        if is_literal or type(read) is type(value):
            return read
    raise ValueError(
        f"{name} is no plain value, such as a number, a text or a list, and nothing else is kept with a run; make it in a factory of your own"
    )


Arguments = Annotated[
    dict[str, Any],
    BeforeValidator(_arguments),
    PlainSerializer(lambda given: {name: argument_as_json(value) for name, value in given.items()}, when_used="json"),
]

"""Arguments of a model's factory, read from texts as a command line has them. No torch here."""

import ast
from collections.abc import Sequence
from typing import Any

from lowmem_pnn.errors import ConfigError


def parse_model_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `--model-arg NAME=VALUE` options.

    Args:
        pairs: Texts of the options; a value that reads as a Python literal is that literal, `true` and `false` are booleans, any
            other value is text.

    Returns:
        Keyword arguments by name.

    Raises:
        ConfigError: A text has no '=', a name is no identifier, or a name is given twice.

    Example:
        >>> parse_model_arguments(["depth=12", "norm=true", "widths=[8, 16]", "act=gelu"])
        {'depth': 12, 'norm': True, 'widths': [8, 16], 'act': 'gelu'}
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name, text = name.strip(), text.strip()
        if not equals or not name.isidentifier():
            raise ConfigError(f"model argument {pair!r} is not NAME=VALUE; write, for example, --model-arg width=64")
        if name in arguments:
            raise ConfigError(f"model argument {name!r} is given twice ({arguments[name]!r} and {text!r}); give it once")
        arguments[name] = _parse_value(text)
    return arguments


def _parse_value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    # Errors that literal_eval documents for text that is no literal, or a literal nested too deep.
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def argument_text(value: Any) -> str:
    """Return the text that `parse_model_arguments` reads as a value.

    Args:
        value: A Python literal, or a text.

    Example:
        >>> argument_text(0.25), argument_text("gelu"), argument_text("0.25"), argument_text([8, 16])
        ('0.25', 'gelu', "'0.25'", '[8, 16]')
    """
    is_read_otherwise = isinstance(value, str) and _parse_value(value.strip()) != value
    return repr(value) if is_read_otherwise else str(value)

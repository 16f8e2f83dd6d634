"""Faults in how a command is typed, in one line and one style, with what was probably meant."""

import re

import click

from lowmem_pnn.config.faults import flag, suggest

_COMMANDS = {
    "train": "fit",
    "run": "fit",
    "test": "evaluate",
    "eval": "evaluate",
    "compare": "bench",
    "benchmark": "bench",
    "ls": "report",
}


def usage_text(error: click.ClickException) -> str:
    """Return a fault in a line, without a full stop at its end; what follows it is another sentence.

    Args:
        error: as click raises it.

    Example:
        >>> usage_text(click.UsageError("Missing argument 'RUN'."))
        "missing argument 'RUN';"
    """
    command = error.ctx.command if isinstance(error, click.UsageError) and error.ctx is not None else None
    if isinstance(error, click.NoSuchOption) and command is not None:
        name = error.option_name.lstrip("-")
        known = [parameter.name or "" for parameter in command.params]
        near = suggest(name.replace("-", "_"), known)
        match = re.search("'(.*)'", near)
        return f"no such option '{error.option_name}'" + (f"; did you mean '{flag(match[1])}'?" if match else ";")
    text = error.format_message().rstrip(".").replace(". ", "; ").replace("; Did you", "; did you")
    text = f"{text[:1].lower()}{text[1:]}"
    unknown = re.match(r"no such command '([^']*)'", text)
    if unknown and (meant := _COMMANDS.get(unknown[1])):
        return f"no such command '{unknown[1]}'; did you mean '{meant}'?"
    return text if text.endswith("?") else f"{text};"

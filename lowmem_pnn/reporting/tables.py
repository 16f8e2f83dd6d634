"""Plain-text tables, their cells, lists of names, and sentences that fit a terminal."""

import textwrap
from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def text_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None, spare: Sequence[str] = ()
) -> str:
    """Lay out a table as plain text, with the first two columns left-aligned and the others right-aligned.

    Args:
        headings: Titles of the columns.
        rows: Cells of each row, as many as there are titles.
        width: Columns that the table is to fit, if it can; None for as many as it takes.
        spare: Titles of columns that are left out, in this order, until it fits.
    """
    if width is not None:
        for heading in spare:
            if sum(max(map(len, column)) + 3 for column in zip(headings, *rows, strict=True)) - 3 <= width:
                break
            kept = [number for number, each in enumerate(headings) if each != heading]
            headings, rows = [headings[number] for number in kept], [[row[number] for number in kept] for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # names are shown as they are, brackets and colons too
    text = StringIO()
    # Never as narrow as the terminal: a wrapped table is easier to read than one that is cut off.
    # Plain text, whatever the process writes to: a notebook, or a terminal of which variables speak (FORCE_COLOR).
    Console(file=text, width=400, force_jupyter=False, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def wrapped(text: str, width: int | None, indent: str = "") -> str:
    """Break a sentence between words, so that its lines fit a terminal; paths and other long words stay whole.

    Args:
        text: One line.
        width: Columns that the lines are to fit, if they can; None leaves it as it is.
        indent: What all lines but the first begin with.

    Example:
        >>> print(wrapped("data: 1,293 to train on, none to test on", 20, "  "))
        data: 1,293 to train
          on, none to test
          on
    """
    if width is None or len(text) <= width:
        return text
    lines = textwrap.wrap(
        text,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        expand_tabs=False,
        replace_whitespace=False,
    )
    return "\n".join(lines)


def describe_skipped(names: Sequence[str], count: int) -> str:
    """Return a line on broken samples that were left out, with the first few by name.

    Args:
        names: Names of the samples, or of the first of them.
        count: Number of the samples.

    Example:
        >>> describe_skipped(["cat/1.png", "cat/7.png"], 2)
        'left out 2 broken samples: cat/1.png, cat/7.png'
    """
    shown = list(names[:5])
    rest = f", and {count - len(shown):,} more" if count > len(shown) else ""
    return f"left out {count:,} broken sample{'s' if count > 1 else ''}: {', '.join(shown)}{rest}"


def layer_range(layers: Sequence[str]) -> str:
    """Return a range of layers in words.

    Args:
        layers: Names of the layers, in order.

    Example:
        >>> layer_range(["conv1", "conv2", "fc"]), layer_range(["fc"])
        ('conv1 to fc', 'fc')
    """
    return layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def drive_share(written_bytes: int, rating: float | None) -> str:
    """Return which share of the terabytes that a drive may be written some bytes are, to be put behind them; nothing without a rating.

    Args:
        written_bytes: bytes written to the drive.
        rating: terabytes that the drive may be written in its life.

    Example:
        >>> drive_share(6 * 10**12, 600)
        ", 1% of the drive's 600 TB"
    """
    return "" if rating is None else f", {100 * written_bytes / (rating * 1e12):.2g}% of the drive's {rating:g} TB"

"""Plain-text tables, and their cells."""

from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table as plain text, with the first two columns left-aligned and the others right-aligned.

    Args:
        headings: Titles of the columns.
        rows: Cells of each row, as many as there are titles.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    # Never as narrow as the terminal: a wrapped table is easier to read than one that is cut off.
    Console(file=text, width=400).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def layer_range(layers: Sequence[str]) -> str:
    """Return a range of layers in words.

    Args:
        layers: Names of the layers, in order.

    Example:
        >>> layer_range(["conv1", "conv2", "fc"]), layer_range(["fc"])
        ('conv1 to fc', 'fc')
    """
    return layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"

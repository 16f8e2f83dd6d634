"""The layout of pages: their style, light and dark, and their sections."""

from html import escape

LIGHT = {
    "--ink": "#22262b", "--grid": "#d9dde1", "--budget": "#c0392b", "--plain": "#7d8791", "--series-0": "#2f6fb0",
    "--series-1": "#d98324", "--series-2": "#3a8f5c", "--series-3": "#8d5fb3", "--series-4": "#b8a21c", "--series-5": "#3aa0a6",
}  # fmt: skip
"""Colours of figures on a light page."""

_COLORS = " ".join(f"{name}: {color};" for name, color in LIGHT.items())
_STYLE = (
    f":root {{ {_COLORS} }}"
    + """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --muted: #5d6670; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --card: #1d2125; --ink: #e4e8ec; --muted: #9aa4ae; --grid: #3a4148;
  --budget: #ef6f61; --plain: #8e98a3; --series-0: #6ba7e5; --series-1: #e8a35a; --series-2: #6cc08d; --series-3: #b893dc;
  --series-4: #d8c65a; --series-5: #6fcbd0; } }
@media print { :root { --page: #ffffff; --card: #ffffff; --ink: #000000; --grid: #cccccc; } section { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0.5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 0 0 0.5rem; }
p { margin: 0.3rem 0; overflow-wrap: anywhere; } p.note { color: var(--muted); font-size: 0.9rem; }
section, .tile { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: 0.9rem; margin: 0.8rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.6rem; }
.tile { margin: 0; } .tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; } .tile span { color: var(--muted); }
.figure { overflow-x: auto; } svg { width: 100%; min-width: 34rem; height: auto; display: block; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; } th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
pre { overflow-x: auto; padding: 0.7rem; border: 1px solid var(--grid); border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
details summary { cursor: pointer; color: var(--muted); margin-top: 0.5rem; }
"""
)


def page(title: str, body: str) -> str:
    """Return a page as HTML.

    Args:
        title: its heading, as text.
        body: what is below, as HTML.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>'
        f"{body}</body></html>\n"
    )


def section(title: str, figure: str, note: str, table: str = "", *, opened: bool = False) -> str:
    """Return a section of a page as HTML.

    Args:
        title: its heading.
        figure: figures, as SVG.
        note: a text below them.
        table: a table, or other HTML.
        opened: whether the table is shown at once; else a reader opens it.
    """
    shown = f'<p class="note">{escape(note)}</p>' if note else ""
    if table:
        shown += table if opened else f"<details><summary>in numbers</summary>{table}</details>"
    return f"<section><h2>{escape(title)}</h2><div class='figure'>{figure}</div>{shown}</section>"

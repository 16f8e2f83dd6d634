"""The page: figures and tables of one run, or of several, as one HTML file that loads nothing from elsewhere."""

import platform
from collections.abc import Sequence
from html import escape
from pathlib import Path

from lowmem_pnn.config.command import fit_command
from lowmem_pnn.errors import DiskError
from lowmem_pnn.page import figures, tables
from lowmem_pnn.page.run_log import RunLog
from lowmem_pnn.units import format_bytes, seconds_text

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #22262b; --muted: #5d6670; --grid: #d9dde1; --budget: #c0392b;
  --plain: #7d8791; --series-0: #2f6fb0; --series-1: #d98324; --series-2: #3a8f5c; --series-3: #8d5fb3; --series-4: #b8a21c;
  --series-5: #3aa0a6; }
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


def write_page(runs: Sequence[Path], out: Path) -> None:
    """Write the page of some runs, whole or not at all.

    Args:
        runs: folders of finished runs, at least one.
        out: the HTML file.

    Raises:
        CheckpointError: a run has not finished, or is damaged.
        DiskError: the page cannot be written.
    """
    text = page_of([RunLog.read(path) for path in runs])
    beside = out.with_name(f"{out.name}.new")  # which a run that is begun anew in the folder deletes
    try:
        beside.write_text(text)
        beside.replace(out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DiskError(f"the page {out} cannot be written: {error.strerror}; give --out FILE elsewhere") from error


def page_of(runs: Sequence[RunLog]) -> str:
    """Return the page of some runs as HTML.

    Args:
        runs: what is shown; one run in all detail, several side by side.
    """
    title, body = _one(runs[0]) if len(runs) == 1 else _several(runs)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>'
        f"{body}</body></html>\n"
    )


def _one(run: RunLog) -> tuple[str, str]:
    result = run.result
    parts = [_tiles(run)]
    if run.memory:
        parts.append(
            _section(
                "Memory over time",
                figures.memory_figure(run),
                "Highest memory in use, coloured by the partition that was on the device; above the floor of "
                f"{format_bytes(result.floor_bytes)} that the process held before training.",
            )
        )
    parts.append(_section("Plan", figures.plan_figure(run), "", tables.partitions_table(run)))
    if run.epochs:
        curves = figures.loss_figure([run])
        if any(line.get("val_accuracy") is not None for line in run.epochs):
            curves += figures.accuracy_figure([run])
        parts.append(_section("Learning", curves, "", tables.epochs_table(run)))
    if any(exit["val_accuracy"] is not None for exit in result.exits):
        parts.append(_section("Early exits", figures.exits_figure(run), "", tables.exits_table(run)))
    parts += [
        _section("Where the seconds went", figures.time_figure(run), f"Drive: {tables.drive_line(run)}."),
        _section("The run", "", "", _facts(run), opened=True),
    ]
    return f"{result.model} on {result.data}, {result.method}", "".join(parts)


def _several(runs: Sequence[RunLog]) -> tuple[str, str]:
    parts = [_section("Runs", figures.peaks_figure(runs), "", tables.runs_table(runs), opened=True)]
    if any(run.epochs for run in runs):
        parts.append(_section("Loss", figures.loss_figure(runs), "Of the last partition of each run."))
    if any(line.get("val_accuracy") is not None for run in runs for line in run.epochs):
        parts.append(_section("Validation accuracy", figures.accuracy_figure(runs), "Of the last partition of each run."))
    parts += [_section(run.name, "", "", _facts(run)) for run in runs]
    return f"{len(runs)} runs side by side", "".join(parts)


def _tiles(run: RunLog) -> str:
    result = run.result
    told = [(format_bytes(result.peak_bytes), f"peak, of a budget of {format_bytes(result.budget_bytes)}")]
    if result.plain_bytes is not None:
        told.append((format_bytes(result.plain_bytes), "plain PyTorch needs (predicted)"))
        if result.peak_bytes < result.plain_bytes:
            told.append((f"{1 - result.peak_bytes / result.plain_bytes:.0%}", "saved"))
    told.append((f"{seconds_text(result.seconds)} s", f"{result.samples_per_second:.0f} samples/s"))
    scores = (
        ("test accuracy", result.test_accuracy, ".1%"),
        ("test loss", result.test_loss, ".4g"),
        ("perplexity", result.perplexity, ".2f"),
    )
    told += [(f"{value:{form}}", name) for name, value, form in scores if value is not None][:1]
    tiles = "".join(f"<div class=tile><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in told)
    return f'<div class="tiles">{tiles}</div>'


def _section(title: str, figure: str, note: str, table: str = "", *, opened: bool = False) -> str:
    shown = f'<p class="note">{escape(note)}</p>' if note else ""
    if table:
        shown += table if opened else f"<details><summary>in numbers</summary>{table}</details>"
    return f"<section><h2>{escape(title)}</h2><div class='figure'>{figure}</div>{shown}</section>"


def _facts(run: RunLog) -> str:
    result = run.result
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines = [
        f"device: {result.device}; {platform.system()}",
        f"data: {result.data_parts or result.data}; {result.preprocessing}",
        f"weights: {result.weights_file}",
        f"versions: {versions}",
        *result.notes,
    ]
    shown = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f"{shown}<p>The command that repeats it:</p><pre>{escape(fit_command(run.config))}</pre>"

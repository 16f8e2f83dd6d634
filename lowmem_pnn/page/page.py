"""The page: figures and tables of one run, or of several, as one HTML file that loads nothing from elsewhere."""

import platform
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from lowmem_pnn.config.code import python_objects
from lowmem_pnn.errors import DiskError
from lowmem_pnn.page import figures, tables
from lowmem_pnn.page.layout import page, section
from lowmem_pnn.page.run_log import RunLog, read_runs
from lowmem_pnn.reporting.result_text import score_text
from lowmem_pnn.settings.command import fit_command, option_words
from lowmem_pnn.units import format_bytes, seconds_text


def write_page(runs: Sequence[Path], out: Path) -> None:
    """Write the page of some runs, whole or not at all.

    Args:
        runs: folders of finished runs, at least one.
        out: the HTML file.

    Raises:
        CheckpointError: a run has not finished, or is damaged.
        DiskError: the page cannot be written.
    """
    if out.is_dir():
        raise DiskError(f"the page {out} cannot be written: it is a folder; give --out FILE")
    text = page_of(read_runs(runs))
    beside = out.with_name(f"{out.name}.new")  # which a run that is begun anew in the folder deletes
    try:
        # Names of files need not be text.
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        beside.replace(out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DiskError(f"the page {out} cannot be written: {error.strerror}; give --out FILE elsewhere") from error


def page_of(runs: Sequence[RunLog]) -> str:
    """Return the page of some runs as HTML.

    Args:
        runs: what is shown; one run in all detail, several side by side.
    """
    return page(*(_one(runs[0]) if len(runs) == 1 else _several(runs)))


def _one(run: RunLog) -> tuple[str, str]:
    result = run.result
    parts = [_tiles(run)]
    if run.memory:
        parts.append(
            section(
                "Memory over time",
                figures.memory_figure(run),
                "Highest memory in use, coloured by the partition that was on the device; above the floor of "
                f"{format_bytes(result.floor_bytes)} that the process held before training.",
            )
        )
    parts.append(section("Plan", figures.plan_figure(run), "", tables.partitions_table(run)))
    if run.epochs:
        curves = figures.loss_figure([run])
        if any(line.get("val_accuracy") is not None for line in run.epochs):
            curves += figures.accuracy_figure([run])
        parts.append(section("Learning", curves, "", tables.epochs_table(run)))
    if any(exit["val_accuracy"] is not None for exit in result.exits):
        parts.append(section("Early exits", figures.exits_figure(run), "", tables.exits_table(run)))
    parts += [
        section("Where the seconds went", figures.time_figure(run), f"Drive: {tables.drive_line(run)}."),
        section("The run", "", "", _facts(run), opened=True),
    ]
    return f"{result.model} on {result.data}, {result.method}", "".join(parts)


def _several(runs: Sequence[RunLog]) -> tuple[str, str]:
    parts = [section("Runs", figures.peaks_figure(runs), "", tables.runs_table(runs), opened=True)]
    if any(run.epochs for run in runs):
        parts.append(section("Loss", figures.loss_figure(runs), "Of the last partition of each run."))
    if any(line.get("val_accuracy") is not None for run in runs for line in run.epochs):
        parts.append(section("Validation accuracy", figures.accuracy_figure(runs), "Of the last partition of each run."))
    parts += [section(run.name, "", "", _facts(run)) for run in runs]
    return f"{len(runs)} runs side by side", "".join(parts)


def _tiles(run: RunLog) -> str:
    result = run.result
    told = [(format_bytes(result.peak_bytes), f"peak, of a budget of {format_bytes(result.budget_bytes)}")]
    if result.plain_bytes is not None:
        told.append((format_bytes(result.plain_bytes), "plain PyTorch needs (predicted)"))
        if result.peak_bytes <= 0.995 * result.plain_bytes:
            told.append((f"{1 - result.peak_bytes / result.plain_bytes:.0%}", "saved"))
    told.append((f"{seconds_text(result.seconds)} s", f"{result.samples_per_second:.0f} samples/s"))
    if not (score := score_text(result)).startswith("none"):
        name, _, value = score.rpartition(" ")
        told.append((value, name))
    tiles = "".join(f"<div class=tile><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in told)
    return f'<div class="tiles">{tiles}</div>'


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
    heading, text = "The command that repeats it", fit_command(run.config)
    if objects := python_objects(vars(run.config)):
        heading = f"It was started from Python, with {', '.join(objects)}; its options"
        text = shlex.join(option_words(run.config))
    return f"{shown}<p>{escape(heading)}:</p><pre>{escape(text)}</pre>"

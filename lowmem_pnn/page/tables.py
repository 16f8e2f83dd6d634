"""Tables of runs in HTML: what each figure shows, in numbers."""

from collections.abc import Sequence
from html import escape

from lowmem_pnn.page.run_log import RunLog
from lowmem_pnn.reporting.result_text import score_text
from lowmem_pnn.reporting.tables import layer_range
from lowmem_pnn.units import format_bytes, seconds_text

DRIVE_TBW = 600
"""Terabytes that a common consumer drive of 1 TB is rated to take in its life."""


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML; every cell is text.

    Example:
        >>> html_table(["a"], [["<b>"]])
        '<div class="table"><table><tr><th>a</th></tr><tr><td>&lt;b&gt;</td></tr></table></div>'
    """
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>'


def partitions_table(run: RunLog) -> str:
    """Return the partitions of a run: plan, peaks, seconds."""
    rows = [
        (
            str(number + 1),
            layer_range(part["layers"]),
            f"{part['params']:,}",
            f"{part['micro_batch']} of {part['batch']}",
            format_bytes(part.get("state_bytes", 0)),
            format_bytes(part["predicted_peak_bytes"]),
            format_bytes(part["peak_bytes"]),
            *(seconds_text(value) for value in (part["seconds"], use["computing"])),
        )
        for number, (part, use) in enumerate(zip(run.result.partitions, run.seconds_by_use, strict=True))
    ]
    headings = (
        "partition", "layers", "parameters", "micro-batch", "training state", "predicted peak", "measured peak", "seconds", "computing, s",
    )  # fmt: skip
    return html_table(headings, rows)


def epochs_table(run: RunLog) -> str:
    """Return the epochs of a run; of more than 60, the last ones."""
    lines = run.epochs[-60:]
    rows = [
        (
            str(line["partition"] + 1),
            str(line["epoch"]),
            _number(line["train_loss"], ".4g"),
            _number(line.get("val_loss"), ".4g"),
            _number(line.get("val_accuracy"), ".1%"),
            _number(line.get("samples_per_second"), ".0f"),
            seconds_text(line["seconds"]),
        )
        for line in lines
    ]
    headings = (
        "partition",
        "epoch",
        "training loss",
        "validation loss",
        "validation accuracy",
        "samples/s",
        "seconds since start",
    )
    return html_table(headings, rows)


def exits_table(run: RunLog) -> str:
    """Return the early exits of a run."""
    rows = [
        (
            f"{number}{', chosen' if number == run.result.chosen_exit else ''}",
            exit["layer"],
            f"{exit['params']:,}",
            _number(exit["val_accuracy"], ".1%"),
            _number(exit["test_accuracy"], ".1%"),
        )
        for number, exit in enumerate(run.result.exits, 1)
    ]
    return html_table(("exit", "after layer", "parameters", "validation accuracy", "test accuracy"), rows)


def runs_table(runs: Sequence[RunLog]) -> str:
    """Return several runs, a line each."""
    return html_table(
        (
            "run", "method", "budget", "peak", "plain PyTorch needs", "score", "seconds", "samples/s", "partitions", "training loss",
            "validation loss", "written", "model",
        ),
        [
            (
                run.name, run.result.method, format_bytes(run.result.budget_bytes), format_bytes(run.result.peak_bytes),
                "-" if run.result.plain_bytes is None else format_bytes(run.result.plain_bytes), score_text(run.result),
                seconds_text(run.result.seconds), f"{run.result.samples_per_second:.0f}", str(len(run.result.partitions)),
                _number(run.result.train_loss, ".4g"), _number(run.result.val_loss, ".4g"), format_bytes(run.result.bytes_written),
                run.result.model,
            )
            for run in runs
        ],
    )  # fmt: skip


def drive_line(run: RunLog) -> str:
    """Say in a line what the run moved, and what its writes mean for a drive."""
    written, given = run.result.bytes_written, run.result.drive_tbw
    percent = 100 * written / ((given or DRIVE_TBW) * 1e12)
    drive = f"{DRIVE_TBW} TB that a common drive of 1 TB" if given is None else f"{given:g} TB that the drive"
    share = f"{percent:.2g} %" if percent >= 0.001 else "less than 0.001 %"
    return f"{format_bytes(run.result.bytes_read)} read and {format_bytes(written)} written; that is {share} of the {drive} is rated to take"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"

"""The page of a bench: peaks beside budgets as a picture, and the table of all contenders."""

from html import escape

from lowmem_pnn.contenders.bench_report import BenchReport
from lowmem_pnn.page.figures import bench_figure
from lowmem_pnn.page.layout import page, section
from lowmem_pnn.page.tables import html_table
from lowmem_pnn.units import format_bytes


def bench_page(report: BenchReport) -> str:
    """Return the page of a bench as HTML that loads nothing from elsewhere.

    Args:
        report: what was measured.
    """
    rows = [
        (
            row.contender,
            row.verdict,
            *(
                "-" if size is None else format_bytes(size)
                for size in (row.budget_bytes, row.peak_bytes, row.predicted_peak_bytes)
            ),
            "-" if row.speed is None else f"{row.speed:.2f}",
            "-" if row.samples_per_second is None else f"{row.samples_per_second:.3g}",
            format_bytes(row.bytes_written),
        )
        for row in report.rows
    ]
    headings = ("contender", "", "budget", "peak", "predicted", "speed", "samples/s", "written")
    note = (
        "Peak: highest private memory of each contender's process above what imports and data hold, polled from outside every 5 ms. "
        "Speed: samples a second as a ratio to plain PyTorch in the same bench."
    )
    title = f"{report.model} on {report.data}: peak memory"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    reasons = dict.fromkeys(
        f"{row.contender}{f' in {format_bytes(row.budget_bytes)}' if row.budget_bytes is not None else ''}: {row.reason}"
        for row in report.rows
        if row.reason
    )
    facts = "".join(f"<p>{escape(reason)}</p>" for reason in reasons)
    facts += f"<p>{escape(f'{report.steps} steps of {report.batch_size} samples on {report.device}; {versions}')}</p>"
    body = section("Peak memory", bench_figure(report.rows), note, html_table(headings, rows), opened=True) + section(
        "The bench", "", "", facts, opened=True
    )
    return page(title, body)

"""The page of a bench: peaks beside budgets as a picture, and the table of all contenders."""

from html import escape

from lowmem_pnn.contenders.bench_report import HEADINGS, BenchReport
from lowmem_pnn.page.figures import bench_figure
from lowmem_pnn.page.layout import page, section
from lowmem_pnn.page.tables import html_table


def bench_page(report: BenchReport) -> str:
    """Return the page of a bench as HTML that loads nothing from elsewhere.

    Args:
        report: what was measured.
    """
    note = (
        "Peak: highest private memory of each contender's process above what imports and data hold, polled from outside every 5 ms. "
        "Speed: samples a second as a ratio to plain PyTorch in the same bench."
    )
    title = f"{report.model} on {report.data}: peak memory"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    facts = "".join(f"<p>{escape(reason)}</p>" for reason in report.reasons)
    facts += f"<p>{escape(f'{report.steps} steps of {report.batch_size} samples on {report.device}; {versions}')}</p>"
    table = html_table(HEADINGS, [row.cells for row in report.rows])
    peaks = section("Peak memory", bench_figure(report.rows), note, table, opened=True)
    return page(title, peaks + section("The bench", "", "", facts, opened=True))

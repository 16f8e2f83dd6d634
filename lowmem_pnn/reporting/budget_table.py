"""The table of budgets: what each method would do in each of them, and which one to take."""

from collections.abc import Sequence

from lowmem_pnn.reporting.plan_report import PlanReport
from lowmem_pnn.reporting.tables import text_table, wrapped
from lowmem_pnn.units import format_bytes, seconds_text


def describe_budgets(reports: Sequence[PlanReport], width: int | None = None) -> str:
    """Return plans in several budgets for people.

    Args:
        reports: a report for each budget, of the same model and data.
        width: columns that the table and sentences are to fit, if it can; None for as many as it takes.
    """
    first = reports[0]
    lines = [f"{first.model} on {first.data}, {first.device}", ""]
    if first.plain_bytes is not None:
        lines += [f"plain PyTorch needs about {format_bytes(first.plain_bytes)}", ""]
    headings = ("budget", "method", "partitions", "micro-batch", "predicted peak", "seconds per epoch")
    rows = [row for report in reports for row in _rows(report)]
    lines += [text_table(headings, rows, width, ("micro-batch", "partitions")), ""]
    for report in reports:
        advice = report.advice or ("fits" if report.fits else report.reason)
        lines.append(wrapped(f"{format_bytes(report.budget_bytes)}: {advice}", width, "  "))
    return "\n".join(lines)


def _rows(report: PlanReport) -> list[tuple[str, ...]]:
    budget = format_bytes(report.budget_bytes)
    if not report.prospects:
        if not report.fits:
            return [(budget, report.method, "does not fit", "-", "-", "-")]
        least = min(part["micro_batch"] for part in report.partitions)
        peak = format_bytes(report.predicted_peak_bytes)
        return [(budget, report.method, str(len(report.partitions)), str(least), peak, "-")]
    return [
        (
            budget if not number else "",
            each.method,
            str(each.partitions),
            str(each.micro_batches[0]),
            format_bytes(each.predicted_peak_bytes),
            seconds_text(each.seconds_per_epoch),
        )
        if each.fits
        else (budget if not number else "", each.method, "does not fit" if each.enough_bytes else "cannot", "-", "-", "-")
        for number, each in enumerate(report.prospects)
    ]

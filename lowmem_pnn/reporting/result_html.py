"""A run's result as HTML for notebooks: the closing summary, and the partitions."""

from html import escape

from lowmem_pnn.reporting.result_fields import ResultFields
from lowmem_pnn.reporting.result_text import summary
from lowmem_pnn.reporting.tables import layer_range
from lowmem_pnn.units import format_bytes


def result_html(result: ResultFields) -> str:
    """Return a result as HTML, in tables that take the notebook's own style.

    Args:
        result: what a run came to.
    """
    title = f"{result.model} on {result.data}, method {result.method}"
    facts = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(text.strip())}</td></tr>"
        for name, _, text in (line.partition(" ") for line in summary(result))
    )
    heads = "".join(
        f"<th>{head}</th>" for head in ("partition", "layers", "parameters", "micro-batch", "predicted", "measured", "seconds")
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape(cell)}</td>"
            for cell in (
                str(number),
                layer_range(part["layers"]),
                f"{part['params']:,}",
                f"{part['micro_batch']} of {part['batch']}",
                format_bytes(part["predicted_peak_bytes"]),
                format_bytes(part["peak_bytes"]),
                f"{part['seconds']:.1f}",
            )
        )
        + "</tr>"
        for number, part in enumerate(result.partitions, 1)
    )
    return (
        f"<div><b>{escape(title)}</b><table>{facts}</table><details><summary>partitions</summary>"
        f"<table><tr>{heads}</tr>{rows}</table></details></div>"
    )

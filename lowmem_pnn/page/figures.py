"""Figures of runs as SVG that takes its colours from the page around it."""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lowmem_pnn.contenders.bench_report import BenchRow
from lowmem_pnn.page.layout import LIGHT
from lowmem_pnn.page.run_log import RunLog
from lowmem_pnn.run.timeline import merged
from lowmem_pnn.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MB = 1e6
MOST_POINTS = 2000
"""Points of a curve; of more, every nth and the last are drawn, and of the memory the highest of several."""

# Drawn with these colours, which the page's style then names: matplotlib writes no CSS variables.
_INK, _GRID, _BUDGET, _PLAIN = "#010101", "#020202", "#030303", "#040404"
_SERIES = ("#050501", "#050502", "#050503", "#050504", "#050505", "#050506")
VARIABLES = {
    _INK: "--ink", _GRID: "--grid", _BUDGET: "--budget", _PLAIN: "--plain",
    **{color: f"--series-{number}" for number, color in enumerate(_SERIES)},
}  # fmt: skip


def memory_figure(run: RunLog) -> str:
    """Draw the memory in use over time, coloured by partition, with the budget and what plain PyTorch needs."""
    points = fewer(run.memory)

    def draw(axes: "Axes") -> None:
        before = 0.0
        for seconds, partition, size in points:
            axes.bar(before, size / MB, width=seconds - before, align="edge", color=_color(int(partition)), linewidth=0)
            before = seconds
        _limits(axes, run)
        axes.set_xlabel("seconds")
        axes.set_ylabel("MB above the floor")
        axes.set_xlim(left=0)

    return _svg(draw, f"memory in use by {run.name} over time")


def plan_figure(run: RunLog) -> str:
    """Draw each partition's predicted peak, its training state in it, and the measured peak."""
    partitions = run.result.partitions

    def draw(axes: "Axes") -> None:
        for number, part in enumerate(partitions):
            state = min(part.get("state_bytes", 0), part["predicted_peak_bytes"])
            axes.barh(number, part["predicted_peak_bytes"] / MB, color=_GRID, height=0.7)
            axes.barh(number, state / MB, color=_color(number), height=0.7)
            axes.plot([part["peak_bytes"] / MB] * 2, [number - 0.4, number + 0.4], color=_INK, linewidth=2)
        axes.set_yticks(range(len(partitions)) if len(partitions) <= 40 else [0, len(partitions) - 1])
        axes.set_yticklabels([str(number + 1) for number in axes.get_yticks()])
        axes.invert_yaxis()
        axes.axvline(run.result.budget_bytes / MB, color=_BUDGET, linewidth=1.5)
        axes.set_xlabel("MB: training state (coloured), predicted peak (grey), measured peak (line), budget (line across)")
        axes.set_ylabel("partition")

    return _svg(draw, f"plan of {run.name}", height=min(8.0, 1.6 + 0.28 * len(partitions)))


def time_figure(run: RunLog) -> str:
    """Draw the seconds of each partition by what they went to."""
    uses = run.seconds_by_use
    kinds = list(dict.fromkeys(kind for use in uses for kind in use))

    def draw(axes: "Axes") -> None:
        left = [0.0] * len(uses)
        for place, kind in enumerate(kinds):
            widths = [use.get(kind, 0.0) for use in uses]
            axes.barh(range(len(uses)), widths, left=left, color=_color(place), height=0.7, label=_use_in_words(kind))
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(uses)) if len(uses) <= 40 else [0, len(uses) - 1])
        axes.set_yticklabels([str(int(number) + 1) for number in axes.get_yticks()])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.set_ylabel("partition")
        _legend(axes)

    return _svg(draw, f"seconds of {run.name}", height=min(8.0, 1.9 + 0.28 * len(uses)))


def exits_figure(run: RunLog) -> str:
    """Draw the accuracy of each early exit against its parameters."""
    exits = [exit for exit in run.result.exits if exit["val_accuracy"] is not None]

    def draw(axes: "Axes") -> None:
        axes.plot([exit["params"] for exit in exits], [100 * exit["val_accuracy"] for exit in exits], "o-", color=_color(0))
        axes.set_xlabel("parameters up to the exit")
        axes.set_ylabel("validation accuracy, %")

    return _svg(draw, f"exits of {run.name}")


def loss_figure(runs: Sequence[RunLog]) -> str:
    """Draw training and validation loss over time; of one run for each partition, of several for the last one."""

    def draw(axes: "Axes") -> None:
        for name, color, lines in _curves(runs):
            seconds = [line["seconds"] for line in lines]
            axes.plot(seconds, [line["train_loss"] for line in lines], "o-", color=color, markersize=3, label=_plain(name))
            if any(line.get("val_loss") is not None for line in lines):
                values = [float("nan") if line.get("val_loss") is None else line["val_loss"] for line in lines]
                axes.plot(seconds, values, "o--", color=color, markersize=3)
        axes.set_xlabel("seconds")
        axes.set_ylabel("loss: training (line), validation (dashed)")
        _legend(axes)

    return _svg(draw, "loss over time")


def accuracy_figure(runs: Sequence[RunLog]) -> str:
    """Draw validation accuracy over time, of the runs that have one."""

    def draw(axes: "Axes") -> None:
        for name, color, lines in _curves(runs):
            known = [line for line in lines if line.get("val_accuracy") is not None]
            values = [100 * line["val_accuracy"] for line in known]
            axes.plot([line["seconds"] for line in known], values, "o-", color=color, markersize=3, label=_plain(name))
        axes.set_xlabel("seconds")
        axes.set_ylabel("validation accuracy, %")
        _legend(axes)

    return _svg(draw, "validation accuracy over time")


def peaks_figure(runs: Sequence[RunLog]) -> str:
    """Draw the peaks of several runs beside their budgets."""

    def draw(axes: "Axes") -> None:
        for number, run in enumerate(runs):
            axes.barh(number, run.result.peak_bytes / MB, color=_color(number), height=0.6)
            for size, color in ((run.result.budget_bytes, _BUDGET), (run.result.plain_bytes, _PLAIN)):
                if size is not None:
                    axes.plot([size / MB] * 2, [number - 0.4, number + 0.4], color=color, linewidth=2)
        axes.set_yticks(range(len(runs)))
        axes.set_yticklabels([_plain(run.name) for run in runs])
        axes.invert_yaxis()
        axes.set_xlabel("MB: peak (bar), budget and plain PyTorch (lines)")

    return _svg(draw, "peaks", height=1.4 + 0.4 * len(runs))


def bench_figure(rows: Sequence[BenchRow]) -> str:
    """Draw the peaks of contenders, those of plain PyTorch in grey, with the budget of each, and what was predicted."""
    ran = [row for row in rows if row.peak_bytes is not None]
    kinds = list(dict.fromkeys(row.contender for row in ran if row.budget_bytes is not None))

    def draw(axes: "Axes") -> None:
        for number, row in enumerate(ran):
            color = _PLAIN if row.budget_bytes is None else _color(kinds.index(row.contender))
            axes.barh(number, (row.peak_bytes or 0) / MB, color=color, height=0.65)
            for size, line in ((row.budget_bytes, _BUDGET), (row.predicted_peak_bytes, _INK)):
                if size is not None:
                    axes.plot([size / MB] * 2, [number - 0.42, number + 0.42], color=line, linewidth=2)
        axes.set_yticks(range(len(ran)))
        axes.set_yticklabels(
            [row.contender if row.budget_bytes is None else f"{row.contender}, {format_bytes(row.budget_bytes)}" for row in ran]
        )
        axes.invert_yaxis()
        axes.set_xlabel("MB: peak (bar), budget (red line), predicted (dark line)")

    return _svg(draw, "peaks of contenders", height=1.4 + 0.32 * len(ran))


def alone(svg: str) -> str:
    """Return a figure as a file of its own, in the light colours of the pages, on a white ground.

    Args:
        svg: a figure, as it stands on a page.
    """
    for variable, color in LIGHT.items():
        svg = svg.replace(f"var({variable})", color)
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ', 1)
    return svg.replace(">", ' font-family="sans-serif"><rect width="100%" height="100%" fill="#ffffff"/>', 1) + "\n"


def _curves(runs: Sequence[RunLog]) -> list[tuple[str, str, list[Any]]]:
    """Return name, colour and lines of each curve over epochs."""
    if len(runs) > 1:
        last = [(run, max((line["partition"] for line in run.epochs), default=0)) for run in runs]
        return [
            (run.name, _color(number), _thinned([line for line in run.epochs if line["partition"] == partition]))
            for number, (run, partition) in enumerate(last)
        ]
    epochs = runs[0].epochs
    return [
        (f"partition {number + 1}", _color(number), _thinned([line for line in epochs if line["partition"] == number]))
        for number in sorted({line["partition"] for line in epochs})
    ]


def _color(number: int) -> str:
    return _SERIES[number % len(_SERIES)]


def _use_in_words(kind: str) -> str:
    return kind if kind == "computing" else f"waiting for {kind}"


def _plain(name: str) -> str:
    """Return a name as a text of a figure, of which matplotlib makes no formula, and which it does not take for a hidden one."""
    shown = name.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{shown}" if shown.startswith("_") else shown


def _legend(axes: "Axes") -> None:
    if 1 < len(axes.get_legend_handles_labels()[1]) <= 12:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="lower right", bbox_to_anchor=(1, 1), ncols=4)


def _limits(axes: "Axes", run: RunLog) -> None:
    axes.axhline(run.result.budget_bytes / MB, color=_BUDGET, linewidth=1.5, label="budget")
    if run.result.plain_bytes is not None:
        axes.axhline(run.result.plain_bytes / MB, color=_PLAIN, linewidth=1.5, linestyle="--", label="plain PyTorch (predicted)")
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def fewer(memory: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return at most `MOST_POINTS` of a timeline of memory, each as high as the highest of those that it stands for.

    Args:
        memory: seconds, partition and bytes of each point.
    """
    points = [list(point) for point in memory]
    while len(points) > MOST_POINTS:
        points = merged(points)
    return points


def _thinned(points: Sequence[Any]) -> list[Any]:
    """Return at most `MOST_POINTS` of them and the last one, spread evenly."""
    stride = -(-len(points) // MOST_POINTS) or 1
    return [*points[:-1:stride], *points[-1:]]


def _svg(draw: Callable[["Axes"], None], title: str, height: float = 3.2) -> str:
    """Return a figure as an SVG element, 8 inches wide."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": title, "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "xtick.color": _INK,
        "ytick.color": _INK, "text.color": _INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": _GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "font.size": 10,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(8, height), layout="constrained")
        draw(figure.add_subplot())
        figure.patch.set_alpha(0)
        figure.axes[0].patch.set_alpha(0)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return _for_page(text[text.index("<svg") :], title)


def _for_page(svg: str, title: str) -> str:
    """Return an SVG element whose names are its own on the page, and whose colours are the page's."""
    prefix = re.sub(r"\W+", "-", title)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit", svg)
    head = f'role="img" aria-label="{escape(title)}"'
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', lambda found: f'<svg viewBox="{found[1]}" {head}>', svg, count=1)

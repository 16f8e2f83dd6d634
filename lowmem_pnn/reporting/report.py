"""Results and plans as people and programs read them: text tables and JSON."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lowmem_pnn.engine.stalls import in_words
from lowmem_pnn.units import format_bytes, gigabytes, seconds_text


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to: the content of `result.json`.

    Exits are numbered from 1, as `export --exit` takes them; `chosen_exit` is the number of the one that `auto` takes.

    `compiled` has the number of `layers` and of `functions` that they share, and the `seconds` that compiling took in the last
    process; `seconds` of the run are without them. It is empty without --compile.

    `skipped_steps` are those of fp16 that were left out because a gradient overflowed.

    Sizes are bytes; peaks are above the floor, which is what the process held before training. `test_accuracy`, or `perplexity`
    where the data is text, is that of `weights_file`. Values that were not measured are None.
    """

    method: str
    model: str
    data: str
    seed: int
    precision: str = "fp32"
    device: str
    budget_bytes: int
    budget_scope: str
    floor_bytes: int
    peak_bytes: int
    host_peak_bytes: int
    predicted_peak_bytes: int
    reserve_bytes: int
    check: Mapping[str, int]
    training_state_bytes: int
    partitions: Sequence[Mapping[str, Any]]
    epochs: Sequence[int]
    seconds: float
    compiled: Mapping[str, float] = dataclasses.field(default_factory=dict)
    samples_per_second: float
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    test_loss: float | None
    test_accuracy: float | None
    test_f1: float | None
    perplexity: float | None = None
    macs: int
    exits: Sequence[Mapping[str, Any]] = ()
    chosen_exit: int | None = None
    bytes_read: int
    bytes_written: int
    oom_retries: int
    skipped_steps: int = 0
    resumed: int
    workdir: str
    weights_file: str
    preprocessing: str
    versions: Mapping[str, str]

    def to_json(self) -> str:
        """The text of `result.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        """A page for people; its last line says model, budget and peak."""
        rows = [
            (
                str(number + 1),
                _span(partition["layers"]),
                f"{partition['params']:,}",
                f"{partition['micro_batch']} of {partition['batch']}",
                str(partition["epochs"]),
                format_bytes(partition["predicted_peak_bytes"]),
                format_bytes(partition["peak_bytes"]),
                f"{partition['seconds']:.1f}",
            )
            for number, partition in enumerate(self.partitions)
        ]
        heads = ("partition", "layers", "parameters", "micro-batch", "epochs", "predicted peak", "measured peak", "seconds")
        lines = [f"{self.model} on {self.data}, method {self.method}, {self.device}", "", text_table(heads, rows)]
        scores = [
            f"{name} {value:{form}}"
            for name, value, form in (
                ("training loss", self.train_loss, ".4g"),
                ("validation loss", self.val_loss, ".4g"),
                ("validation accuracy", self.val_accuracy, ".1%"),
                ("test accuracy", self.test_accuracy, ".1%"),
                ("test F1", self.test_f1, ".3f"),
                ("test loss", self.test_loss if self.test_accuracy is None else None, ".4g"),
                ("perplexity", self.perplexity, ".2f"),
            )
            if value is not None
        ]
        if self.exits:
            lines += ["", _exits_table(self.exits, self.chosen_exit)]
        lines += ["", ", ".join(scores), f"{self.seconds:.1f} s, {self.samples_per_second:.0f} samples/s"]
        if self.precision != "fp32":
            left_out = f", {self.skipped_steps} steps left out" if self.skipped_steps else ""
            lines.append(f"computed in {self.precision}{left_out}")
        lines.append(f"disk: {format_bytes(self.bytes_read)} read, {format_bytes(self.bytes_written)} written")
        waited = [partition.get("waited", {}) for partition in self.partitions]
        seconds = sum(partition["seconds"] for partition in self.partitions)
        kinds = dict.fromkeys(kind for own in waited for kind in own)
        if seconds and kinds:
            lines[-1] += "; " + in_words({kind: sum(own.get(kind, 0.0) for own in waited) / seconds for kind in kinds})
        if self.oom_retries:
            lines.append(f"{self.oom_retries} batches did not fit and were done again with smaller micro-batches")
        if self.check:
            lines.append(
                f"checked before training: predicted {format_bytes(self.check['predicted_bytes'])}, "
                f"measured {format_bytes(self.check['measured_bytes'])}, unexplained {format_bytes(self.check['unexplained_bytes'])}"
            )
        lines += [
            f"weights: {self.weights_file}",
            f"model {format_bytes(self.training_state_bytes)} (weights, gradients and optimizer state), "
            f"budget {format_bytes(self.budget_bytes)}, peak {format_bytes(self.peak_bytes)}",
        ]
        return "\n".join(lines)


def _exits_table(exits: Sequence[Mapping[str, Any]], chosen: int | None) -> str:
    """Early exits: where each ends, what it weighs and gives; the one that `export` takes is marked."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    rows = [
        (
            f"{number}{' chosen' if number == chosen else ''}",
            exit["layer"],
            f"{exit['params']:,}",
            percent(exit["val_accuracy"]),
            percent(exit["test_accuracy"]),
            f"{exit['samples_per_second']:.0f}",
        )
        for number, exit in enumerate(exits, 1)
    ]
    return text_table(("exit", "after layer", "parameters", "validation", "test", "samples/s"), rows)


@dataclass(frozen=True, kw_only=True)
class MethodEstimate:
    """What training by one method would come to; all numbers are 0 where it does not fit.

    Args:
        method: its name.
        asked: whether it is the one that the plan is for.
        fits: whether it can run; else `reason` says why not, and `enough_bytes` is the smallest budget that would do, if any.
        reason: why it cannot.
        enough_bytes: a budget.
        partitions: how many.
        micro_batches: the smallest and the largest of theirs, in samples.
        predicted_peak_bytes: of them.
        seconds_per_epoch: of all partitions, with the validation at its end, and what is done once for all epochs spread over them.
        seconds: of the whole training, recovery epochs included; commits, start, test and export are not.
        bytes_read_per_epoch: from the drive, or what the system keeps of it in memory.
        bytes_written_per_epoch: to it.
        measured_share: of the multiply-accumulates, whose layers were timed; the others' times are estimated from these.
    """

    method: str
    asked: bool
    fits: bool = False
    reason: str = ""
    enough_bytes: int | None = None
    partitions: int = 0
    micro_batches: tuple[int, int] = (0, 0)
    predicted_peak_bytes: int = 0
    seconds_per_epoch: float = 0.0
    seconds: float = 0.0
    bytes_read_per_epoch: int = 0
    bytes_written_per_epoch: int = 0
    measured_share: float = 0.0

    def row(self) -> tuple[str, ...]:
        """Cells of the table of methods."""
        name = f"{'> ' if self.asked else '  '}{self.method}"
        if not self.fits:
            # The first fault, without what would help against it.
            why = self.reason.partition("; ")[0]
            needs = why if self.enough_bytes is None else f"fits from {format_bytes(self.enough_bytes)} on"
            return name, needs, *["-"] * 6
        least, most = self.micro_batches
        return (
            name,
            "fits",
            str(self.partitions),
            str(least) if least == most else f"{least} to {most}",
            format_bytes(self.predicted_peak_bytes),
            seconds_text(self.seconds_per_epoch),
            gigabytes(self.bytes_read_per_epoch),
            gigabytes(self.bytes_written_per_epoch),
        )


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What a run would come to.

    Sizes are bytes. `fits` is whether it can run within the budget and `max_disk`; where it cannot, `reason` says why and
    `exit_code` is that of the `fit` that would fail so. `prospects` are all methods side by side; none where nothing was timed.
    """

    method: str
    model: str
    data: str
    device: str
    budget_bytes: int
    reserve_bytes: int
    training_state_bytes: int
    predicted_peak_bytes: int
    disk_bytes: int
    partitions: Sequence[Mapping[str, Any]]
    fits: bool
    reason: str
    exit_code: int
    prospects: Sequence[MethodEstimate] = ()

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def __str__(self) -> str:
        """The table of partitions, and whether it fits."""
        rows = [
            (
                str(number + 1),
                _span(partition["layers"]),
                f"{partition['params']:,}",
                f"{partition['micro_batch']} of {partition['batch']}",
                format_bytes(partition["state_bytes"]),
                format_bytes(partition["predicted_peak_bytes"]),
                format_bytes(partition["activation_bytes"]) if partition["activation_bytes"] else "-",
            )
            for number, partition in enumerate(self.partitions)
        ]
        heads = ("partition", "layers", "parameters", "micro-batch", "training state", "predicted peak", "outputs kept")
        verdict = (
            f"fits: predicted peak {format_bytes(self.predicted_peak_bytes)} and a reserve of {format_bytes(self.reserve_bytes)} "
            f"within {format_bytes(self.budget_bytes)}"
            if self.fits
            else f"does not fit: {self.reason}"
        )
        lines = [f"{self.model} on {self.data}, method {self.method}, {self.device}", ""]
        if rows:
            lines += [text_table(heads, rows), "", f"disk: at most {format_bytes(self.disk_bytes)}"]
        if self.prospects:
            lines += [*_prospects_table(self.prospects), ""]
        lines += [f"model {format_bytes(self.training_state_bytes)} (weights, gradients and optimizer state)", verdict]
        return "\n".join(lines)


def _prospects_table(prospects: Sequence[MethodEstimate]) -> list[str]:
    """Methods side by side, the asked one marked; and how much of it was measured."""
    heads = ("  method", "", "partitions", "micro-batch", "predicted peak", "seconds an epoch", "GB read", "GB written")
    lines = ["", text_table(heads, [prospect.row() for prospect in prospects])]
    shares = [prospect.measured_share for prospect in prospects if prospect.fits]
    if shares and min(shares) < 1:
        lines.append(f"layers with {min(shares):.0%} of the multiply-accumulates were timed, the others estimated from these")
    return lines


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text, columns right-aligned but for the first two.

    Args:
        heads: column titles.
        rows: cells, as many as there are titles.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    # As wide as it needs to be: a table cut off by the terminal's width says less than a wrapped one.
    Console(file=text, width=400).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _span(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"

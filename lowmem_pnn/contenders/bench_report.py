"""The report of a bench: a row for each contender, as text, JSON and CSV."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.reporting.tables import text_table, wrapped
from lowmem_pnn.units import format_bytes

HEADINGS = ("contender", "", "budget", "peak", "predicted", "speed", "samples/s", "written")
"""Headings of the rows."""


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """What became of one contender.

    Args:
        contender: a method, or `plain`, `checkpointing`, `accumulation`.
        budget_bytes: budget that it was given; None for plain PyTorch, which knows none.
        peak_bytes: highest private memory of its process above the floor, polled from outside every 5 ms; on a GPU what the process says
            of the device. None where it did not run.
        predicted_peak_bytes: what was predicted; None where nothing was.
        samples_per_second: samples of an epoch of all partitions, over its seconds; None where it did not run.
        speed: the same as a ratio to `plain` in the same bench; None without that.
        fits: whether it ran, within its budget; plain PyTorch: within the largest budget.
        bytes_written: bytes written to the drive.
        reason: why it did not run; else empty.
        enough_bytes: smallest budget in which it would, where it is known.
        exit_code: code that its process ended with where it did not run: those of `lowmem-pnn`, or a signal below 0; else None.
    """

    contender: str
    budget_bytes: int | None = None
    peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    samples_per_second: float | None = None
    speed: float | None = None
    fits: bool = False
    bytes_written: int = 0
    reason: str = ""
    enough_bytes: int | None = None
    exit_code: int | None = None

    @property
    def verdict(self) -> str:
        """What became of it, in a word or three."""
        if self.fits:
            return "fits"
        if self.exit_code == ConfigError.exit_code:
            return "cannot"
        # What the system ends for lack of memory ends by a signal.
        return "does not fit" if self.exit_code in (None, BudgetError.exit_code) or self.exit_code < 0 else "failed"

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as people read it, under `HEADINGS`."""
        return (
            self.contender,
            self.verdict,
            _size(self.budget_bytes),
            _size(self.peak_bytes),
            _size(self.predicted_peak_bytes),
            "-" if self.speed is None else f"{self.speed:.2f}",
            "-" if self.samples_per_second is None else f"{self.samples_per_second:.3g}",
            _size(self.bytes_written or None),
        )


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What a bench has measured.

    `schema_version` rises when a key changes its meaning or goes; keys may be added without that.

    Args:
        model: name of the model.
        data: name of the data.
        device: the device, in words.
        batch_size: samples of a step.
        steps: steps that each contender trained, or was to train.
        rows: a row for each contender, in the order in which they ran.
        versions: versions of what computed.
    """

    schema_version: int = 1
    model: str
    data: str
    device: str
    batch_size: int
    steps: int
    rows: Sequence[BenchRow]
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why contenders did not run, a text for each."""
        texts = (
            f"{row.contender}{'' if row.budget_bytes is None else f' in {format_bytes(row.budget_bytes)}'}: {row.reason}"
            for row in self.rows
            if row.reason
        )
        return tuple(dict.fromkeys(texts))

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def to_csv(self) -> str:
        """Return the rows as CSV, with a line of names."""
        out = io.StringIO()
        names = [field.name for field in dataclasses.fields(BenchRow)]
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in self.rows)
        return out.getvalue()

    def describe(self, width: int | None = None) -> str:
        """Return the report for people.

        Args:
            width: columns that the table and sentences are to fit, if they can; None for as many as it takes.
        """
        lines = [
            f"{self.model} on {self.data}, {self.device}: {self.steps} steps of {self.batch_size} samples each",
            "",
            text_table(HEADINGS, [row.cells for row in self.rows], width, spare=("samples/s", "written", "predicted")),
            "",
        ]
        facts = list(self.reasons)
        if any(row.speed is not None for row in self.rows):
            facts.append("speed: samples a second as a ratio to plain PyTorch, where that was run beside it")
        if self.reasons:
            facts.append(
                "contenders take training steps alone: a run that validates and tests may need more, and plan says how much"
            )
        facts.append("peak: highest private memory of the process above what imports and data hold, polled from outside")
        return "\n".join([*lines, *(wrapped(fact, width, "  ") for fact in facts)])

    def __str__(self) -> str:
        """Return the report for people."""
        return self.describe()


def _size(size: int | None) -> str:
    return "-" if size is None else format_bytes(size)

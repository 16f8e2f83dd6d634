"""The report of `plan`: a table of the partitions, whether they fit, and all methods side by side."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_pnn.reporting.advice import advise, plain_fits
from lowmem_pnn.reporting.method_estimate import MethodEstimate, method_table
from lowmem_pnn.reporting.tables import describe_skipped, drive_share, layer_range, text_table, wrapped
from lowmem_pnn.reporting.tier_table import TierEstimate, tier_table
from lowmem_pnn.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Preview of a run.

    Sizes are in bytes. `fits` says whether the run fits the budget and `max_disk`; where it does not, `reason` says why and `exit_code`
    is the exit code with which `fit` would end. `notes` say in what training would differ from plain PyTorch's. `prospects` are the
    estimates of all methods; empty where nothing was timed. `tiers` are the seconds of a step on a described GPU (`--gpu`), by where weights
    and optimizer state lie; empty on a device that is here. `preprocessing` says how samples are presented to the model,
    `written_bytes` is what training writes to the drive in all, without commits, and `drive_tbw` how many terabytes the drive may be
    written; `data_parts` how many there are in each part; `plain_bytes` is the predicted peak of a plain PyTorch loop with the same batch;
    `skipped_samples` holds the `count` of broken samples that are left out, and the `names` of the first 100.
    """

    schema_version: int = 1
    method: str
    model: str
    data: str
    device: str
    budget_bytes: int
    reserve_bytes: int
    training_state_bytes: int
    plain_bytes: int | None = None
    predicted_peak_bytes: int
    disk_bytes: int
    written_bytes: int | None = None
    drive_tbw: float | None = None
    partitions: Sequence[Mapping[str, Any]]
    fits: bool
    reason: str
    exit_code: int
    notes: Sequence[str] = ()
    prospects: Sequence[MethodEstimate] = ()
    tiers: Sequence[TierEstimate] = ()
    preprocessing: str = ""
    data_parts: str = ""
    skipped_samples: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"count": 0, "names": []})

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def _disk(self) -> str:
        text = f"disk: at most {format_bytes(self.disk_bytes)}"
        if self.written_bytes is None:
            return text
        return f"{text}, {format_bytes(self.written_bytes)} written in training{drive_share(self.written_bytes, self.drive_tbw)}"

    @property
    def advice(self) -> str:
        """Which method to take, and why; an empty text where methods were not compared."""
        if not self.prospects:
            return ""
        return advise(self.prospects, plain_fits=plain_fits(self.plain_bytes, self.reserve_bytes, self.budget_bytes))

    def __str__(self) -> str:
        """Return the report for people: the table of partitions, the table of methods, and whether the run fits."""
        return self.describe()

    def describe(self, width: int | None = None) -> str:
        """Return the report for people.

        Args:
            width: columns that tables and sentences are to fit, if they can; None for as many as they take.
        """
        rows = [
            (
                str(number + 1),
                layer_range(partition["layers"]),
                f"{partition['params']:,}",
                f"{partition['micro_batch']} of {partition['batch']}",
                format_bytes(partition["state_bytes"]),
                format_bytes(partition["predicted_peak_bytes"] - partition.get("ahead_bytes", 0)),
                format_bytes(partition.get("ahead_bytes", 0)),
                format_bytes(partition["activation_bytes"]) if partition["activation_bytes"] else "-",
            )
            for number, partition in enumerate(self.partitions)
        ]
        headings = ("partition", "layers", "parameters", "micro-batch", "training state", "needs", "ahead", "stored outputs")
        spare = ("stored outputs", "ahead", "parameters", "training state")
        verdict = (
            f"fits: predicted peak {format_bytes(self.predicted_peak_bytes)} and a reserve of {format_bytes(self.reserve_bytes)} "
            f"within {format_bytes(self.budget_bytes)}"
            if self.fits
            else f"does not fit: {self.reason}"
        )
        lines = [f"{self.model} on {self.data}, method {self.method}, {self.device}", ""]
        if self.plain_bytes is not None:
            enough = plain_fits(self.plain_bytes, self.reserve_bytes, self.budget_bytes)
            has_it = ", which this budget has: it trains there without all this" if enough else ""
            lines += [wrapped(f"plain PyTorch needs about {format_bytes(self.plain_bytes)}{has_it}", width, "  "), ""]
        if self.data_parts:
            lines += [wrapped(f"data: {self.data_parts}", width, "  "), ""]
        if self.skipped_samples["count"]:
            lines += [wrapped(describe_skipped(self.skipped_samples["names"], self.skipped_samples["count"]), width, "  "), ""]
        if rows:
            lines += [text_table(headings, rows, width, spare), "", wrapped(self._disk(), width, "  "), ""]
        if self.prospects:
            table = method_table(self.prospects, width, is_described=bool(self.tiers))
            lines += [table, "", wrapped(self.advice, width, "  "), ""]
        if self.tiers:
            lines += [tier_table(self.tiers, width), ""]
        lines += [
            f"model {format_bytes(self.training_state_bytes)} (weights, gradients and optimizer state)",
            *(wrapped(note, width, "  ") for note in (*self.notes, verdict)),
        ]
        return "\n".join(lines)

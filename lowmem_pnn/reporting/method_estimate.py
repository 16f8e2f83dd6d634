"""Estimates of training by each method, as rows of a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_pnn.reporting.tables import text_table, wrapped
from lowmem_pnn.units import format_bytes, seconds_text


@dataclass(frozen=True, kw_only=True)
class MethodEstimate:
    """Estimate of training by one method; all numbers but `enough_bytes` are 0 where the method does not fit.

    Args:
        method: Name of the method.
        asked: Whether the plan is for this method.
        fits: Whether the method can run.
        reason: Why the method cannot run; else empty.
        enough_bytes: Smallest budget with which the method fits, in bytes; None where no budget would do, or it is not known.
        partitions: Number of partitions.
        micro_batches: Smallest and largest micro-batch of the partitions, in samples.
        predicted_peak_bytes: Largest predicted peak of the partitions.
        seconds_per_epoch: Predicted seconds of one epoch of all partitions, with the validation at its end; work that is done once for
            all epochs is spread over them.
        seconds: Predicted seconds of the whole training, with recovery epochs; without commits, start, test and export.
        bytes_read_per_epoch: Bytes read from the drive, or from its pages that the system keeps in memory.
        bytes_written_per_epoch: Bytes written to the drive.
        measured_share: Share of the multiply-accumulates whose layers were timed; the times of the others are estimated from these.
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

    @property
    def _fits_from(self) -> str:
        return "-" if self.enough_bytes is None else format_bytes(self.enough_bytes)

    def row(self) -> tuple[str, ...]:
        """Return the method's cells in the table of methods."""
        name = f"{'> ' if self.asked else '  '}{self.method}"
        if not self.fits:
            return name, "does not fit" if self.enough_bytes is not None else "cannot", self._fits_from, *["-"] * 6
        least, most = self.micro_batches
        return (
            name,
            "fits",
            self._fits_from,
            str(self.partitions),
            str(least) if least == most else f"{least} to {most}",
            format_bytes(self.predicted_peak_bytes),
            seconds_text(self.seconds_per_epoch),
            _traffic(self.bytes_read_per_epoch),
            _traffic(self.bytes_written_per_epoch),
        )


def method_table(estimates: Sequence[MethodEstimate], width: int | None = None, *, is_described: bool = False) -> str:
    """Lay out the methods side by side, with the asked one marked; lines say why some cannot, and how much was timed.

    Args:
        estimates: Estimates of the methods, at least one.
        width: Columns that the table is to fit, if it can; None for as many as it takes.
        is_described: Whether nothing was timed, since the estimates are for a machine that is not here.
    """
    headings = (
        "  method",
        "",
        "smallest budget",
        "partitions",
        "micro-batch",
        "predicted peak",
        "seconds per epoch",
        "read",
        "written",
    )
    spare = ("read", "written", "micro-batch", "partitions", "predicted peak")
    lines = [text_table(headings, [estimate.row() for estimate in estimates], width, spare)]
    for each in estimates:
        if not each.fits and each.enough_bytes is None:
            # The fault alone; its remedies follow a semicolon.
            lines.append(wrapped(f"{each.method} cannot: {each.reason.partition('; ')[0]}", width, "  "))
    shares = [] if is_described else [estimate.measured_share for estimate in estimates if estimate.fits]
    if shares and not min(shares):
        lines.append("layers would take too long to be timed: seconds are computed from counts and a timed matrix product")
    elif shares and min(shares) < 1:
        lines.append(f"layers with {min(shares):.0%} of the multiply-accumulates were timed, the others estimated from these")
    return "\n".join(lines)


def _traffic(size: int) -> str:
    return format_bytes(size) if size else "-"

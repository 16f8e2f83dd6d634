"""The table of tiers: seconds of a step by where weights and optimizer state lie, on a GPU that was described."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_pnn.reporting.tables import text_table, wrapped
from lowmem_pnn.units import format_bytes, seconds_text


@dataclass(frozen=True)
class TierEstimate:
    """Estimate of a step.

    Args:
        tier: Where weights and optimizer state lie between their uses.
        seconds_per_step: Predicted seconds.
        needs_bytes: Bytes that they take there; in the device's memory, with activations.
        has_bytes: Bytes that there are; None where that is not known.
    """

    tier: str
    seconds_per_step: float
    needs_bytes: int
    has_bytes: int | None

    @property
    def fits(self) -> bool | None:
        """Whether there is room; None where that is not known."""
        return None if self.has_bytes is None else self.needs_bytes <= self.has_bytes

    def row(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        has = "-" if self.has_bytes is None else format_bytes(self.has_bytes)
        verdict = {None: "", True: "fits", False: "does not fit"}[self.fits]
        return self.tier, seconds_text(self.seconds_per_step), format_bytes(self.needs_bytes), has, verdict


def tier_table(tiers: Sequence[TierEstimate], width: int | None = None) -> str:
    """Lay out the tiers, with lines on what the figures are.

    Args:
        tiers: Estimates, at least one.
        width: Columns that the lines are to fit, if they can; None for as many as they take.
    """
    headings = ("weights and state in", "seconds per step", "needs", "of", "")
    notes = (
        "nothing was timed: seconds are computed from the description, at half of its TFLOP/s; layers are priced by the CPU's kernels",
        "host RAM: as if all lay page-locked there, with no commit; a run keeps half of what is available there, and copies once more",
    )
    return "\n".join([text_table(headings, [tier.row() for tier in tiers]), *(wrapped(note, width, "  ") for note in notes)])

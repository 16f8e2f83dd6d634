"""Run status: how far a run is at a moment, and what it takes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Status of a run while it trains.

    Args:
        num_samples: samples of the epoch that are done.
        loss: mean training loss of the epoch so far; None where nothing counted yet.
        used_bytes: device memory in use, above the floor.
        budget_bytes: budget of the device.
        written_bytes: bytes written to the drive so far.
        visit_share: share of the epochs under way, those of one partition or of all together, that is done.
        run_share: share of the whole run that is done, by multiply-accumulates.
    """

    num_samples: int
    loss: float | None
    used_bytes: int
    budget_bytes: int
    written_bytes: int = 0
    visit_share: float = 0.0
    run_share: float = 0.0

"""The state of a run: what the journal holds, and a resume goes on from."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lowmem_pnn.engine.tally import EpochProgress, Tally
from lowmem_pnn.model.precision import LossScale


@dataclass
class PartitionRecord:
    """What is known of a partition once it was trained.

    Args:
        seconds: in its visits.
        waited: of them, without computing, by what was waited for.
        peak_bytes: the most that was in use during them, above the floor.
        train_loss: mean over its last epoch.
        val_loss: after its last epoch.
        val_accuracy: likewise, for the last partition, and where every layer has scores.
        unit_val_accuracies: likewise, of each of its layers, where they have scores of their own.
    """

    seconds: float = 0.0
    waited: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None
    unit_val_accuracies: list[float] = field(default_factory=list)


@dataclass
class State:
    """Where a run is, and what belongs to that place.

    Args:
        plan: of the run, as `Plan.to_json` writes it.
        micro_batches: of each partition, as they are by now.
        sweep_micro_batch: of all partitions in sweeps, likewise.
        loss_scales: of each partition; that of the last one is a sweep's.
        data: the data set's fingerprint.
        number: of the commit.
        stage: `born`, `training` or `done`; `trained` where the first rank has yet to take the partition over.
        visit: position in the method's program.
        progress: within it.
        weights: the weight store's committed files.
        activations: names of the stores that later visits read, by split.
        records: of each partition.
        check: prediction and measurement before training.
        seconds: so far, over all processes of the run; as are the bytes, the peaks and the counts that follow.
        metrics_bytes: length of `metrics.jsonl`.
        rank: which of several processes this is, each training one partition; the first joins them.
        ranks: how many they are.
    """

    plan: dict[str, Any]
    micro_batches: list[int]
    sweep_micro_batch: int = 0
    loss_scales: list[LossScale] = field(default_factory=list)
    data: str = ""
    number: int = 0
    stage: str = "born"
    visit: int = 0
    progress: EpochProgress = field(default_factory=EpochProgress)
    weights: dict[str, Any] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    records: list[PartitionRecord] = field(default_factory=list)
    check: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    peak_bytes: int = 0
    host_peak_bytes: int = 0
    oom_retries: int = 0
    resumed: int = 0
    metrics_bytes: int = 0
    rank: int = 0
    ranks: int = 1

    @classmethod
    def from_journal(cls, body: dict[str, Any]) -> "State":
        """Read what `to_journal` gave."""
        progress = dict(body["progress"])
        progress["tally"] = Tally(**progress["tally"])
        return cls(
            **{
                **body,
                "progress": EpochProgress(**progress),
                "records": [PartitionRecord(**record) for record in body["records"]],
                # Runs of a time when there was no other precision have none.
                "loss_scales": [LossScale(**scale) for scale in body.get("loss_scales") or [{} for _ in body["micro_batches"]]],
            }
        )

    def to_journal(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self)

    def go_back_to(self, commit: "State") -> None:
        """Take over the place of a commit, in the same process: what was spent since then stays spent.

        Args:
            commit: of this run.
        """
        for name in ("visit", "progress", "weights", "activations", "loss_scales"):
            setattr(self, name, getattr(commit, name))

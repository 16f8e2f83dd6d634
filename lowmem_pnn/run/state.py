"""The state of a run: what the journal holds, and a resume goes on from."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lowmem_pnn.engine.tally import EpochProgress, Tally
from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.run.ranks import Rank
from lowmem_pnn.workload import Workload

RunStatus = Literal["born", "training", "trained", "done"]
"""`born`: planned, nothing is written; `training`; `trained`: the first rank has yet to join the partition; `done`: with a result."""


@dataclass
class PartitionRecord:
    """What is known of a partition once it was trained.

    Args:
        seconds: time spent in its visits.
        waited: share of that time without computing, in seconds, by what was waited for.
        peak_bytes: highest use of memory during its visits, above the floor.
        train_loss: mean loss over its last epoch.
        val_loss: validation loss after its last epoch.
        val_accuracy: validation accuracy after its last epoch, where its outputs are class scores.
        unit_val_accuracies: validation accuracy of each of its layers, where these have scores of their own.
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
    """Where a run is, and what belongs to that point. Its fields are the journal's keys.

    Args:
        plan: plan of the run, as `Plan.to_json` writes it.
        micro_batches: present micro-batch of each partition, in samples.
        sweep_micro_batch: present micro-batch of all partitions in sweeps, in samples.
        loss_scales: factor on the loss of each partition; that of the last one is a sweep's.
        data: fingerprint of the data set, and the number of samples of each part.
        number: number of the commit.
        stage: status of the run.
        visit: position in the method's program.
        progress: position within the visit or sweep.
        weights: committed files of the weight store.
        activations: names of the stores that later visits read, by split and view.
        records: records of the partitions.
        check: prediction and measurement of the check before training, in bytes.
        seconds: time so far, over all processes of the run, as are the bytes, peaks and counts that follow.
        metrics_bytes: length of `metrics.jsonl`.
        compared: whether the model was compared with its layers before training.
        module_state: Python attributes of modules that forwards change, by module and attribute.
        rank: number of this process, where several train a partition each; the first joins them.
        ranks: number of these processes.
    """

    plan: dict[str, Any]
    micro_batches: list[int]
    sweep_micro_batch: int = 0
    loss_scales: list[LossScale] = field(default_factory=list)
    data: str = ""
    number: int = 0
    stage: RunStatus = "born"
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
    compared: Literal["yes", "no"] = "no"
    module_state: dict[str, Any] = field(default_factory=dict)
    rank: int = 0
    ranks: int = 1

    @classmethod
    def first(cls, workload: Workload, plan: Plan, rank: Rank) -> "State":
        """Return the state of a run that is planned, with nothing written.

        Args:
            workload: model, data and method.
            plan: partitions of the model.
            rank: which of several processes this is.
        """
        return cls(
            plan=json.loads(plan.to_json()),
            micro_batches=[part.micro_batch for part in plan.partitions],
            sweep_micro_batch=plan.sweep_micro_batch,
            loss_scales=[LossScale.initial(workload.config.precision) for _ in plan.partitions],
            records=[PartitionRecord() for _ in plan.partitions],
            data=workload.data_stamp,
            module_state=workload.chain.python_state,
            rank=rank.number,
            ranks=rank.size,
        )

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
        """Return a copy that JSON can hold."""
        return asdict(self)

    def go_back_to(self, commit: "State") -> None:
        """Take over the position of a commit, in the same process: what was spent since then stays spent.

        Args:
            commit: state of this run at the commit.
        """
        for name in ("visit", "progress", "weights", "activations", "loss_scales", "module_state"):
            setattr(self, name, getattr(commit, name))

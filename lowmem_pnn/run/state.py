"""The state of a run: what the journal holds, and a resume goes on from."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from lowmem_pnn.engine.tally import EpochProgress, Tally
from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.run.ranks import ALONE, Rank
from lowmem_pnn.stores.disk import RUN_REMEDY
from lowmem_pnn.stores.keys import parse_entry, parse_state
from lowmem_pnn.workload import Workload

Stage = Literal["born", "training", "trained", "done"]
"""`born`: planned, nothing is written; `training`; `trained`: the first rank has yet to join the partition; `done`: with a result."""

LEFT_FILES = ("model.safetensors", "heads.safetensors", "result.json")
"""Files that a finished run leaves."""

_STORE_KEY = re.compile(r"(train|val|test)(\+\d{1,9})?")
STORE_NAME = re.compile(r"b\d{2,9}-(train|val|test)(-\d{1,9})?")
"""Names of stores of activations that the journal may name."""

_LARGEST = 2**62


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
        val_scores: other scores on the validation part, where one of them is watched.
        unit_val_accuracies: validation accuracy of each of its layers, where these have scores of their own.
        unit_val_losses: validation loss of each of them.
    """

    seconds: float = 0.0
    waited: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None
    val_scores: dict[str, float] = field(default_factory=dict)
    unit_val_accuracies: list[float] = field(default_factory=list)
    unit_val_losses: list[float] = field(default_factory=list)


@dataclass
class Best:
    """The validation that was best, where that is watched.

    Args:
        epoch: finished epochs by then.
        step: optimizer steps by then; 0 where there is no best yet.
        value: what `--monitor` was.
        weights: committed files of its weights, where they are kept; empty until its commit is made.
        module_state: Python attributes of modules, as they were then.
    """

    epoch: int = 0
    step: int = 0
    value: float | None = None
    weights: dict[str, Any] = field(default_factory=dict)
    module_state: dict[str, Any] = field(default_factory=dict)


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
        epoch_tallies: losses of the present epoch by partition, where an epoch is several visits (of macro-batches); else none.
        weights: committed files of the weight store.
        activations: names of the stores that later visits read, by split and view.
        records: records of the partitions.
        check: prediction and measurement of the check before training, in bytes.
        seconds: time so far, over all processes of the run, as are the bytes, peaks and counts that follow.
        metrics_bytes: length of `metrics.jsonl`.
        compared: whether the model was compared with its layers before training.
        mixing: modules that mix the samples of a batch, beside BatchNorm, with the numbers of their layers.
        module_state: Python attributes of modules that forwards change, by module and attribute.
        best: the epoch that was best on the validation part.
        without_gain: validations since the best one, or since the present visit or sweep began.
        stopped_after: epochs after which training ended early.
        stopped_step: optimizer steps after which training ended early; 0 where it did not.
        said_before: what the model said before training after each prompt of `--sample`; empty until it was asked.
        meta: what the training of the meta model came to; empty before it, and where there is none.
        pretrained: what is said of the pretrained weights that training began with, their hash too; empty where there were none.
        files: size and SHA-256 of the files that a finished run leaves, by name; empty for runs of earlier versions.
        epochs: epochs that a resume has raised the options' to; 0 where none has.
        epochs_behind: epochs that the next sweep has behind it, of a run that goes on from its end, while what frozen layers give is
            written again; else 0.
        provenance: what its bits depend on beside options and data (`run.provenance`); empty for runs of earlier versions.
        changes: what of it was other at a resume, a line each.
        moved: what a resume has found files and folders under that options name, by option.
        rank: number of this process, where several train a partition each; the first joins them.
        ranks: number of these processes.
    """

    plan: dict[str, Any]
    micro_batches: list[int]
    sweep_micro_batch: int = 0
    loss_scales: list[LossScale] = field(default_factory=list)
    data: str = ""
    number: int = 0
    stage: Stage = "born"
    visit: int = 0
    progress: EpochProgress = field(default_factory=EpochProgress)
    epoch_tallies: list[Tally] = field(default_factory=list)
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
    mixing: dict[str, int] = field(default_factory=dict)
    module_state: dict[str, Any] = field(default_factory=dict)
    best: Best = field(default_factory=Best)
    without_gain: int = 0
    stopped_after: int = 0
    stopped_step: int = 0
    said_before: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    pretrained: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    epochs: int = 0
    epochs_behind: int = 0
    provenance: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
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
            pretrained={} if workload.pretrained is None else workload.pretrained.to_dict(),
            rank=rank.number,
            ranks=rank.size,
        )

    @classmethod
    def trained(cls, workload: Workload, plan: Plan, module_state: Mapping[str, Any]) -> "State":
        """Return the state of a trained run for another plan than it was trained by.

        Args:
            workload: model, data and method.
            plan: partitions of the model.
            module_state: Python attributes of modules, as the run left them.
        """
        return replace(cls.first(workload, plan, ALONE), module_state=dict(module_state))

    @classmethod
    def from_journal(cls, body: dict[str, Any], path: Path = Path("journal.json")) -> "State":
        """Read what `to_journal` gave, and check it: a seal shows that it was not damaged, not who wrote it.

        Args:
            body: body of the journal.
            path: run or journal that it is from, for messages.

        Raises:
            CheckpointError: it is not a valid journal.
        """
        # Runs of a time when there was no other precision have no scales.
        micro_batches = body.get("micro_batches")
        defaults: dict[str, Any] = {"loss_scales": [{}] * len(micro_batches)} if isinstance(micro_batches, list) else {}
        body = {**defaults, **body} if body.get("loss_scales") else {**body, **defaults}
        try:
            if unknown := sorted(set(body) - {one.name for one in fields(cls)}):
                raise CheckpointError(f"unknown {unknown[0]!r}")
            # By its text, since only there a strict reading takes dictionaries for dataclasses.
            state = _STATES.validate_json(json.dumps(body), strict=True)
            plan = _PLANS.validate_json(json.dumps(state.plan), strict=True)
            state._check(plan)
            state.plan = json.loads(plan.to_json())
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = ".".join(map(str, fault["loc"])) or "journal"
            raise CheckpointError(_described(path, f"{place} {str(fault['msg']).lower()}")) from None
        except (CheckpointError, RecursionError) as error:
            raise CheckpointError(_described(path, str(error) or "too deep a nesting")) from None
        return state

    def _check(self, plan: Plan) -> None:
        """Refuse values that no run has.

        Raises:
            CheckpointError: with the fault, to follow the journal's name.
        """
        parts = plan.partitions
        spans = [(part.start, part.stop) for part in parts]
        checks = {
            "no partitions": not parts,
            "partitions that do not follow each other": not parts
            or spans[0][0] != 0
            or any(start >= stop for start, stop in spans)
            or any(before[1] != after[0] for before, after in pairwise(spans)),
            "a batch below 1": any(min(part.batch, part.micro_batch) < 1 for part in parts)
            or min(plan.smallest_micro_batch, 1 if plan.loss_chunk is None else plan.loss_chunk) < 1
            or (plan.vocabulary_tile or 0) < 0,
            f"micro_batches {self.micro_batches}": len(self.micro_batches) != len(parts)
            or min(self.micro_batches, default=0) < 1,
            f"{len(self.records)} records for {len(parts)} partitions": len(self.records) != len(parts),
            f"{len(self.loss_scales)} loss_scales for {len(parts)} partitions": len(self.loss_scales) != len(parts),
            f"{len(self.epoch_tallies)} epoch_tallies for {len(parts)} partitions": len(self.epoch_tallies)
            not in (0, len(parts)),
            "a loss scale of 0": any(scale.value <= 0 for scale in self.loss_scales),
            f"rank {self.rank} of {self.ranks}": not 0 <= self.rank < self.ranks,
            "a name of activations that is none of ours": not all(
                _STORE_KEY.fullmatch(key) and STORE_NAME.fullmatch(name) for key, name in self.activations.items()
            ),
            "a name of a file that is none of ours": not set(self.files) <= set(LEFT_FILES),
        }
        if fault := next((fault for fault, holds in checks.items() if holds), None):
            raise CheckpointError(fault)
        # A loss on the validation split may be anything, and what was not foreseen in a check may be negative.
        _check_counts(
            {
                **asdict(self),
                "records": [{**asdict(record), **_NO_LOSSES} for record in self.records],
                "check": {},
                "meta": {},
                "module_state": {},
                "best": {**asdict(self.best), "value": None, "module_state": {}},
            }
        )
        for name, entry in self.files.items():
            parse_entry(entry, name)
        if self.best.weights:
            parse_state(Path("weights"), self.best.weights)
        if self.stage != "born":
            committed = parse_state(Path("weights"), self.weights)
            if len(committed) - ("rest" in committed) != len(parts):
                raise CheckpointError(f"no weights of {len(parts)} partitions")

    def to_journal(self) -> dict[str, Any]:
        """Return a copy that JSON can hold."""
        return asdict(self)

    def go_back_to(self, commit: "State") -> None:
        """Take over the position of a commit, in the same process: what was spent since then stays spent.

        Args:
            commit: state of this run at the commit.
        """
        for name in _OF_A_POSITION:
            setattr(self, name, getattr(commit, name))


_OF_A_POSITION = (
    "visit", "progress", "weights", "activations", "loss_scales", "module_state", "best", "without_gain", "stopped_after", "stopped_step",
    "epochs_behind", "epoch_tallies",
)  # fmt: skip
_NO_LOSSES: dict[str, Any] = {"train_loss": None, "val_loss": None, "val_scores": {}}
_STATES, _PLANS = TypeAdapter(State), TypeAdapter(Plan)


def states_of(bodies: Sequence[dict[str, Any]]) -> list[State]:
    """Return the states of older commits; a body that is none of ours is left out: nobody can go back to it.

    Args:
        bodies: bodies of journals.
    """
    states = []
    for body in bodies:
        with suppress(CheckpointError):
            states.append(State.from_journal(body))
    return states


def weights_of(states: Sequence[State]) -> list[dict[str, Any]]:
    """Return the weight files that commits name: their own, and those of their best epochs.

    Args:
        states: states of commits.
    """
    return [weights for state in states for weights in (state.weights, state.best.weights) if weights]


def _check_counts(value: Any) -> None:
    """Refuse counts that are negative or beyond 64 bits, and numbers that are not finite, anywhere in a value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _check_counts(item)
    elif (isinstance(value, int) and not 0 <= value <= _LARGEST) or (isinstance(value, float) and not math.isfinite(value)):
        raise CheckpointError(f"the number {value}"[:60])


def _described(path: Path, fault: str) -> str:
    return f"the journal of {path} is not a valid journal ({fault}); {RUN_REMEDY}"

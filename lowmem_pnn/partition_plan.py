"""Plans: the partitions of a chain, their micro-batches and predicted peaks, as plain data that goes to JSON and back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PartitionPlan:
    """One partition of a plan.

    Args:
        start: First layer of the partition.
        stop: Layer after the last.
        micro_batch: Samples on the device at once.
        batch: Samples of an optimizer step.
        predicted_peak_bytes: Most bytes that the partition will take, with everything that is needed beside it.
        state_bytes: Bytes of weights, buffers, gradients and optimizer state.
        num_params: Number of elements in the parameters.
        input_bytes_per_sample: Bytes of a sample before the partition.
        output_bytes_per_sample: Bytes of a sample after the partition.
        forward_macs: Multiply-accumulates of a forward, per sample.
    """

    start: int
    stop: int
    micro_batch: int
    batch: int
    predicted_peak_bytes: int
    state_bytes: int
    num_params: int
    input_bytes_per_sample: int
    output_bytes_per_sample: int
    forward_macs: int


@dataclass(frozen=True)
class Plan:
    """Partitions of a chain, with their micro-batches and predicted peaks.

    Args:
        partitions: Partitions in order; together they cover every layer once.
        budget_bytes: Budget that the plan was made for.
        overhead_bytes: Bytes of the budget that are kept free for everything beside the partitions.
        predicted_peak_bytes: Largest predicted peak of the partitions: without the reserve, and without `waiting_bytes`.
        smallest_micro_batch: Fewest samples that the modules accept at once, to which a micro-batch may shrink.
        loss_chunk: Rows for which the last layer and the loss are computed at once; None for all rows of a micro-batch.
        vocabulary_tile: Rows of the last layer's weight for which scores and gradients are made at a time, of a whole batch, and 0 where that
            is not done; then gradients of wide embeddings are kept as rows too. None where all gradients are made as a whole.
        sweep_micro_batch: Samples on the device at once in sweeps, the same for all partitions; 0 where there are no sweeps.
        stream_bytes: Bytes of weights and optimizer state that a method of sweeps prefetches, and as many that wait to be written; 0
            for other methods.
        waiting_bytes: Most bytes that wait to be written in sweeps, where host and device are one. Plans keep them free beside the
            predicted peak and the reserve: the drive mostly keeps up.
        whole_batches: Whether a batch goes through at once, and no micro-batch may be halved.
        kept_layers: Layers whose products a sweep keeps from their first forward for the second.
        kept_bytes: Most bytes of these products, of one batch, in a file.
        resident_weights: Layers whose weights stay in memory from one visit of a sweep to the next.
        resident_state: Layers whose optimizer state does.
        resident_bytes: Bytes of both; the predicted peaks count them.
        thin_macs: Multiply-accumulates of a forward of each thin part, per sample; empty where there is no meta model.
        meta_params: Number of elements in the parameters of the meta model; 0 where there is none.
        meta_peak_bytes: Most bytes that its training will take.
    """

    partitions: tuple[PartitionPlan, ...]
    budget_bytes: int
    overhead_bytes: int
    predicted_peak_bytes: int
    smallest_micro_batch: int
    loss_chunk: int | None = None
    vocabulary_tile: int | None = None
    sweep_micro_batch: int = 0
    stream_bytes: int = 0
    waiting_bytes: int = 0
    whole_batches: bool = False
    kept_layers: tuple[int, ...] = ()
    kept_bytes: int = 0
    resident_weights: tuple[int, ...] = ()
    resident_state: tuple[int, ...] = ()
    resident_bytes: int = 0
    thin_macs: tuple[int, ...] = ()
    meta_params: int = 0
    meta_peak_bytes: int = 0

    def title(self, number: int, layers: Sequence[str]) -> str:
        """Return a partition in words.

        Args:
            number: Number of the partition, from 0.
            layers: Names of all layers of the chain.
        """
        part = self.partitions[number]
        return f"partition {number + 1} of {len(self.partitions)} ({layers[part.start]} to {layers[part.stop - 1]})"

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First layer of each partition, and the layer after its last."""
        return [(partition.start, partition.stop) for partition in self.partitions]

    @property
    def cuts(self) -> tuple[int, ...]:
        """Layers that start a partition, without the first: `plan(..., cuts=...)` gives the same partitions again."""
        return tuple(partition.start for partition in self.partitions[1:])

    def to_json(self) -> str:
        """Return the plan as JSON text, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> "Plan":
        """Read a plan that `to_json` wrote.

        Args:
            text: JSON text, or the object that it holds.
        """
        data = dict(json.loads(text) if isinstance(text, str) else text)
        partitions = tuple(PartitionPlan(**partition) for partition in data["partitions"])
        lists = {name: tuple(data.get(name, ())) for name in ("kept_layers", "resident_weights", "resident_state", "thin_macs")}
        return cls(**{**data, "partitions": partitions, **lists})

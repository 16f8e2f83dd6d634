"""Plans: how a chain is cut and fed, as plain data that goes to JSON and back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PartitionPlan:
    """One partition of a plan.

    Args:
        start: its first layer.
        stop: the layer after its last.
        micro_batch: samples on the device at once.
        batch: samples a step.
        predicted_peak_bytes: the most it will hold, the plan's overhead included.
        state_bytes: weights, buffers, gradients and optimizer state.
        num_params: elements of its parameters.
        input_bytes_per_sample: what it reads.
        output_bytes_per_sample: what it writes.
        forward_macs: multiply-accumulates of a forward, per sample.
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
    """How a chain is cut and fed.

    Args:
        partitions: in order; together they cover every layer once.
        budget_bytes: what it was made for.
        overhead_bytes: of it, kept free for what is needed beside the partitions.
        predicted_peak_bytes: the largest of the partitions' peaks.
        smallest_micro_batch: the fewest samples that the modules accept at once, to which an executor may shrink.
        loss_chunk: rows for which the last layer and the loss are computed at once; None for all of a micro-batch.
        sweep_micro_batch: samples on the device at once in sweeps, the same for all partitions; 0 where there are none.
        stream_bytes: of weights and optimizer state that a method by sweeps reads ahead, and as many that wait to be written; 0 else.
    """

    partitions: tuple[PartitionPlan, ...]
    budget_bytes: int
    overhead_bytes: int
    predicted_peak_bytes: int
    smallest_micro_batch: int
    loss_chunk: int | None = None
    sweep_micro_batch: int = 0
    stream_bytes: int = 0

    def title(self, number: int, layers: Sequence[str]) -> str:
        """A partition in words.

        Args:
            number: the partition's, from 0.
            layers: names of all layers of the chain.
        """
        part = self.partitions[number]
        return f"partition {number + 1} of {len(self.partitions)} ({layers[part.start]} to {layers[part.stop - 1]})"

    @property
    def cuts(self) -> tuple[int, ...]:
        """The layers that start a partition, without the first: `plan(..., cuts=...)` gives the same partitions again."""
        return tuple(partition.start for partition in self.partitions[1:])

    def to_json(self) -> str:
        """The plan as JSON text, which `from_json` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> "Plan":
        """Read what `to_json` wrote.

        Args:
            text: JSON text, or the object in it.
        """
        data = dict(json.loads(text) if isinstance(text, str) else text)
        return cls(**{**data, "partitions": tuple(PartitionPlan(**partition) for partition in data["partitions"])})

"""A state of a run of two partitions, and the journal that says it."""

import json
import math
from typing import Any

from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.run.state import PartitionRecord, State

PART = {
    "micro_batch": 4, "batch": 8, "predicted_peak_bytes": 9, "state_bytes": 5, "num_params": 3, "input_bytes_per_sample": 1,
    "output_bytes_per_sample": 1, "forward_macs": 7,
}  # fmt: skip
PLAN = {
    "partitions": [{"start": 0, "stop": 2, **PART}, {"start": 2, "stop": 3, **PART}], "budget_bytes": 9, "overhead_bytes": 1,
    "predicted_peak_bytes": 9, "smallest_micro_batch": 1, "loss_chunk": None, "vocabulary_tile": None,
    "sweep_micro_batch": 0, "stream_bytes": 0, "whole_batches": False,
    "waiting_bytes": 0, "kept_layers": [], "kept_bytes": 0, "resident_weights": [], "resident_state": [], "resident_bytes": 0,
    "thin_macs": [], "meta_params": 0, "meta_peak_bytes": 0,
}  # fmt: skip
WEIGHTS = {
    "format": 1,
    "partitions": [{"file": f"p00{number}.g000001.safetensors", "sha256": "0" * 64, "bytes": 100} for number in range(2)],
    "rest": None,
}


def state(**changes: Any) -> State:
    return State(
        **{
            "plan": PLAN,
            "micro_batches": [4, 8],
            "loss_scales": [LossScale.initial("fp16")] * 2,
            "records": [PartitionRecord(val_loss=math.inf), PartitionRecord(waited={"disk": 0.5})],
            "stage": "training",
            "weights": WEIGHTS,
            "activations": {"train": "b01-train", "train+2": "b01-train-7", "val": "b01-val"},
            "check": {"unexplained_bytes": -5},
            **changes,
        }
    )


def body(**changes: Any) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(state().to_journal()))
    return {**read, **changes}

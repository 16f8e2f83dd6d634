"""Plans of three partitions whose multiply-accumulates show in a sum which of them it took."""

from typing import Any

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.partition_plan import PartitionPlan, Plan

# A sample's forward through three partitions; sums show which of them it took.
MACS = (100, 10, 1)
SAMPLES = 50


def plan(macs: tuple[int, ...] = MACS) -> Plan:
    sizes: dict[str, int] = {
        "micro_batch": 8, "batch": 8, "predicted_peak_bytes": 1, "state_bytes": 1, "num_params": 1, "input_bytes_per_sample": 1,
        "output_bytes_per_sample": 1,
    }  # fmt: skip
    parts = [PartitionPlan(start=number, stop=number + 1, forward_macs=each, **sizes) for number, each in enumerate(macs)]
    return Plan(tuple(parts), budget_bytes=1, overhead_bytes=0, predicted_peak_bytes=1, smallest_micro_batch=1)


def config(**options: Any) -> FitConfig:
    return configure(max_gpu_mem="100MB", device="cpu", model="mlp:64-32-16-10", data="digits", **options)

"""Tiers: seconds of a step on a described GPU, by where weights and optimizer state lie between their uses."""

import dataclasses
import math

from lowmem_pnn.config.gpu_description import GpuDescription
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.forecast import forecast_epoch
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.time_estimate import forecast_inputs
from lowmem_pnn.profiling.costs import ties_counted_once
from lowmem_pnn.profiling.nominal import nominal_timings, speed_of_gpu
from lowmem_pnn.reporting.tier_table import TierEstimate
from lowmem_pnn.workload.plain_training import plain_training_bytes


def estimate_tiers(request: PlanRequest, gpu: GpuDescription, plan: Plan) -> list[TierEstimate]:
    """Estimate a step with everything in the device's memory, and by a plan from host memory and from the drive.

    Args:
        request: Workload, layer costs and device.
        gpu: The GPU.
        plan: Partitions and their micro-batches.
    """
    profile, batch = request.profile, max(part.batch for part in plan.partitions)
    layers = ties_counted_once(profile.layers)
    stored = sum(layer.weight_bytes + layer.buffer_bytes + layer.optimizer_bytes for layer in layers)
    whole = plain_training_bytes(profile, batch)
    context = request.device.fixed_bytes
    return [
        TierEstimate("device memory", _in_memory(request, gpu, batch), whole + context, gpu.memory_bytes),
        TierEstimate("host RAM", _by_plan(request, plan, gpu, batch, drive=False), stored, gpu.ram_bytes),
        TierEstimate("disk", _by_plan(request, plan, gpu, batch, drive=True), stored, None),
    ]


def _in_memory(request: PlanRequest, gpu: GpuDescription, batch: int) -> float:
    """Return the seconds of a step of plain training: forward, backward, step."""
    timings = nominal_timings(request.profile, speed_of_gpu(gpu))
    passes = sum(layer.forward.at(batch) + layer.backward.at(batch) for layer in timings.layers)
    learning = sum(layer.num_params for layer in ties_counted_once(request.profile.layers) if layer.gradient_bytes)
    return passes + learning * timings.step_per_parameter


def _by_plan(request: PlanRequest, plan: Plan, gpu: GpuDescription, batch: int, *, drive: bool) -> float:
    """Return the mean seconds of a step of the plan's training, without validation."""
    inputs = forecast_inputs(request, plan)
    samples = inputs.samples["train"]
    alone = dataclasses.replace(inputs, samples={"train": samples})
    program = [
        item for item in request.workload.program(plan.spans) if getattr(item, "split", "train") == "train"
    ]  # validation is no part of a step
    timings = nominal_timings(request.profile, speed_of_gpu(gpu, drive=drive))
    epoch = forecast_epoch(program, plan, alone, timings)
    # However well it is hidden beside computing: from the drive all of it goes one way at a time, from the host's memory both ways at once.
    read, written = epoch.bytes_read, epoch.bytes_written
    moving = (read + written if drive else max(read, written)) * timings.read_per_byte
    return max(epoch.seconds, moving) / math.ceil(samples / batch)

"""What a plan takes beside its partitions' own state and activations: on the device, and on disk."""

import math
from collections.abc import Sequence

from lowmem_pnn.device import Device
from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.errors import DiskError
from lowmem_pnn.memory.aligned import PAGE_BYTES
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.profiling.costs import Affine, MemoryProfile
from lowmem_pnn.stores.encoding import WORK_BYTES, Encoding, encoded_bytes
from lowmem_pnn.stores.shard_layout import samples_per_shard
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload

_FLOAT_BYTES = 4


def objective_memory(workload: Workload, stop: int, chunk: int | None = None, *, sweeps: bool = False) -> Affine:
    """What the objective of a partition needs on the device.

    Args:
        workload: model, data and method.
        stop: the layer after its last.
        chunk: rows at a time, at the end of the chain.
        sweeps: in a sweep only the last partition has one.
    """
    chain = workload.chain
    is_last = stop == len(chain.layers)
    if sweeps and not is_last:
        return Affine(0, 0)
    # Which partition it is does not matter to its memory, only whether it is the last.
    objective = workload.method.objective(0, 1 if is_last else 2, chain.boundaries[stop], workload.dataset.num_classes)
    elements = [(math.prod(spec.shape), spec.dtype) for spec in chain.boundaries[stop]]
    memory = objective.memory(sum(number * max(_FLOAT_BYTES, dtype.itemsize) for number, dtype in elements))
    # Losses are computed in float32, whatever the layers compute in.
    copies = sum(number * _FLOAT_BYTES for number, dtype in elements if dtype.is_floating_point and dtype.itemsize < _FLOAT_BYTES)
    memory = Affine(memory.fixed, memory.per_sample + copies)
    if chunk is None or not is_last:
        return memory
    return Affine(memory.fixed + math.ceil(memory.per_sample * chunk / workload.rows_per_sample), 0)


def beside_bytes(
    workload: Workload, profile: MemoryProfile, device: Device, buffers: BufferSizes, boundary: int, batch: int
) -> int:
    """Device memory that is needed beside a partition while it trains, for its samples and its streams.

    Args:
        workload: model, data and method.
        profile: what the layers cost.
        device: the training device.
        buffers: sizes of the buffers between disk, host and device.
        boundary: where the partition's samples come from: 0 is the data set.
        batch: samples a step.
    """
    reading = reading_bytes(workload, device, buffers, boundary, batch)
    # Samples at inner boundaries of a sweep are read from shards when the model is measured.
    return max(reading, sweep_bytes(workload, profile, device, buffers, batch)) if workload.method.sweeps else reading


def sweep_bytes(workload: Workload, profile: MemoryProfile, device: Device, buffers: BufferSizes, batch: int) -> int:
    """The same of a sweep: one layer's optimizer state; batches of the data set, streams of weights, boundary activations."""
    state = max(layer.optimizer_bytes for layer in profile.layers)
    if not device.shares_host:
        return state + buffers.transfer_bytes
    # The gradient that other partitions left, and the sum with it.
    shared = 2 * profile.shared_bytes
    return (
        state
        + shared
        + reading_bytes(workload, device, buffers, 0, batch)
        + 2 * stream_bytes(profile, buffers.stream_bytes)
        + buffers.boundary_bytes
    )


def stream_bytes(profile: MemoryProfile, window_bytes: int) -> int:
    """What a sweep reads ahead, and as much that it writes behind: a tensor that is larger than the window waits alone."""
    return max(window_bytes, max(layer.weight_bytes for layer in profile.layers))


def reading_bytes(workload: Workload, device: Device, buffers: BufferSizes, boundary: int, batch: int) -> int:
    """Device memory that samples take while they are read; where the host is not the device, while they are copied there and back.

    Args:
        workload: model and data.
        device: the training device.
        buffers: sizes of the buffers between disk, host and device.
        boundary: where the samples are read: 0 is the data set.
        batch: samples a step.
    """
    if not device.shares_host:
        return buffers.transfer_bytes
    labels = 8 * workload.rows_per_sample
    beside = labels + 24  # a place in the order
    sample = sum(spec.sample_bytes for spec in workload.chain.boundaries[boundary]) + beside
    batches = 2 * batch * sample
    if workload.config.activation_dtype != "float32":
        batches += WORK_BYTES
    if boundary == 0:
        # And the epoch's order, while it is made.
        return batches + 24 * max(len(split) for split in workload.splits.values())
    if workload.method.partitions_are_independent:
        codes = workload.method.objective(0, 2, workload.chain.boundaries[boundary], workload.dataset.num_classes).memory(0).fixed
        return batches + codes + 32 * len(workload.splits["train"])  # labels, and the epoch's order while it is made
    # The validation set's window is open while the training set's stays in memory for the next epoch.
    kept = activation_bytes(workload, boundary) + beside
    train = min(buffers.window_bytes, len(workload.splits["train"]) * kept)
    val = min(buffers.window_bytes // 2, len(workload.splits["val"]) * kept) if "val" in workload.splits else 0
    # Where that is less than there is, the model is still measured on all of it.
    measured = min(buffers.window_bytes // 2, _num_measured(workload) * sample) if kept < sample else 0
    return batches + max(train + val, measured)


def disk_bytes(workload: Workload, plan: Plan, profile: MemoryProfile) -> int:
    """The most that the run directory will take, beside the export: weights in their generations, and boundary activations.

    A visit rewrites one partition at a time. A sweep writes all of them, while the commit before is still on its way to the drive:
    two more generations; and it keeps what crosses partitions for one batch.
    """
    config, encoding = workload.config, workload.config.activation_dtype
    stored = [
        PAGE_BYTES
        + sum(layer.weight_bytes + layer.buffer_bytes + layer.optimizer_bytes for layer in profile.layers[part.start : part.stop])
        for part in plan.partitions
    ]
    outputs = [part.output_bytes_per_sample for part in plan.partitions[:-1]]
    kept = [activation_bytes(workload, part.stop) for part in plan.partitions[:-1]]
    # Stores of activations hold training and validation samples; where training is by sweeps, only what the model is measured on.
    streams = workload.method.sweeps or workload.method.partitions_are_independent
    samples = (
        0 if streams else sum(size * (config.views if name == "train" else 1) for name, size in workload.training_splits.items())
    )
    labels = 16 * workload.rows_per_sample
    stores = max(_num_measured(workload) * (_two_of(outputs) + labels), samples * (_two_of(kept) + labels))
    stores += max(_headers(workload, plan, _num_measured(workload), "float32"), _headers(workload, plan, samples, encoding))
    working = max(stored) + stores
    if plan.sweep_micro_batch:
        gradients = sum(layer.gradient_bytes for layer in profile.layers) if config.steps_wait else 0
        batch = plan.partitions[-1].batch
        gradients += math.ceil(batch / plan.sweep_micro_batch) * profile.shared_bytes
        working = max(working, 2 * sum(stored) + batch * (sum(outputs) + max(outputs, default=0)) + gradients)
    export = sum(layer.weight_bytes + layer.buffer_bytes for layer in profile.layers)
    return sum(stored) * config.keep_commits + max(working, export)


def _headers(workload: Workload, plan: Plan, samples: int, encoding: Encoding) -> int:
    """What the headers of two stores take: a page for each shard."""
    shard_bytes, labels = BufferSizes.of_budget(plan.budget_bytes).shard_bytes, workload.dataset.label_shape
    boundaries = [workload.chain.boundaries[part.stop] for part in plan.partitions[:-1]] if samples else []
    shards = [math.ceil(samples / samples_per_shard(specs, samples, shard_bytes, labels, encoding)) for specs in boundaries]
    # Each part of the data ends in a shard that is not full.
    return 2 * PAGE_BYTES * (max(shards, default=0) + len(workload.splits))


def _two_of(outputs: Sequence[int]) -> int:
    """The most that a partition's inputs and outputs take together, from what the boundaries between partitions do."""
    return max((left + right for left, right in zip([0, *outputs], [*outputs, 0], strict=True)), default=0)


def _num_measured(workload: Workload) -> int:
    """Samples of the largest part that the whole model is measured on."""
    return max((len(workload.splits[name]) for name in ("val", "test") if name in workload.splits), default=0)


def activation_bytes(workload: Workload, boundary: int) -> int:
    """Bytes of one sample in the stores that partitions learn from.

    Args:
        workload: model, data and the type they are kept as.
        boundary: where.
    """
    return sum(encoded_bytes(spec, workload.config.activation_dtype) for spec in workload.chain.boundaries[boundary])


def check_disk(workload: Workload, plan: Plan, profile: MemoryProfile) -> None:
    """Refuse a run that would pass `--max-disk`.

    Raises:
        DiskError: it would.
    """
    limit, needed = workload.config.max_disk, disk_bytes(workload, plan, profile)
    if limit is not None and needed > limit:
        raise DiskError(f"the run needs up to {format_bytes(needed)} on disk, above --max-disk {format_bytes(limit)}; give more")

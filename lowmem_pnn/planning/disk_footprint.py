"""Disk space of a run: weights in their generations, and stores of boundary activations."""

import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.errors import DiskError
from lowmem_pnn.memory.aligned import PAGE_BYTES
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.profiling.costs import MemoryProfile, ties_counted_once
from lowmem_pnn.stores.encoding import Encoding, encoded_bytes
from lowmem_pnn.stores.shard_layout import samples_per_shard
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload

_FLOAT_BYTES = 4


def disk_bytes(workload: Workload, plan: Plan, profile: MemoryProfile) -> int:
    """Return the most bytes that the run directory will take, the export and what comes after it included.

    Frozen weights are there once. A visit rewrites one partition at a time. A sweep writes all of them, while the commit before is still
    on its way to the drive: two more generations; and it keeps the boundary tensors, and products, of one batch.

    Args:
        workload: Model, data and method.
        plan: Partitions and their micro-batches.
        profile: Memory costs of the layers.
    """
    config, encoding = workload.config, workload.config.activation_dtype
    layers = ties_counted_once(profile.layers)
    stored = [
        PAGE_BYTES
        + sum(layer.gradient_bytes + layer.buffer_bytes + layer.optimizer_bytes for layer in layers[part.start : part.stop])
        for part in plan.partitions
    ]
    frozen = sum(layer.weight_bytes - layer.gradient_bytes for layer in layers)
    outputs = [part.output_bytes_per_sample for part in plan.partitions[:-1]]
    stored_outputs = [activation_bytes(workload, part.stop) for part in plan.partitions[:-1]]
    # Stores of activations hold training and validation samples; where training needs none, only the samples of an evaluation.
    no_stores = workload.method.sweeps or workload.method.partitions_are_independent
    samples = 0 if no_stores else num_stored_samples(workload)
    labels = 2 * workload.dataset.targets.sample_bytes
    evaluated = num_evaluated_samples(workload)
    evaluation = evaluated * (_largest_neighbours(outputs) + labels)
    evaluation_headers = _header_bytes(workload, plan, evaluated, "float32")
    stores = max(evaluation, samples * (_largest_neighbours(stored_outputs) + labels))
    stores += max(evaluation_headers, _header_bytes(workload, plan, samples, encoding))
    working = max(stored) + stores
    if plan.sweep_micro_batch:
        gradients = sum(layer.gradient_bytes for layer in layers) + workload.chain.written_bytes if config.steps_wait else 0
        batch = plan.partitions[-1].batch
        gradients += stored_gradient_bytes(workload, plan, profile, math.ceil(batch / plan.sweep_micro_batch))
        working = max(working, 2 * sum(stored) + batch * (sum(outputs) + max(outputs, default=0)) + gradients)
        working += fixed_outputs_bytes(workload, plan) + plan.kept_bytes
    # A folder for transformers has the same file under a second name.
    export = sum(layer.weight_bytes + layer.buffer_bytes for layer in layers) + workload.source.copied_bytes(config.tokenizer)
    if config.lora is not None:
        export += sum(layer.gradient_bytes for layer in layers)  # the adapter's own folder
    # The model is tested when it has been exported.
    export += evaluation + evaluation_headers
    # The meta model's own run: weights, gradients' place and moments, in two generations, and what it leaves.
    working += 9 * _FLOAT_BYTES * plan.meta_params
    kept = sum(stored) * (config.keep_commits + (config.keep_weights == "best"))
    return frozen + kept + max(working, export)


def stored_gradient_bytes(workload: Workload, plan: Plan, profile: MemoryProfile, micro_batches: int) -> int:
    """Return the most bytes of gradients of a batch that later partitions leave to an earlier one, and of those that are made in pieces.

    Args:
        workload: Model, data and method.
        plan: Partitions and their micro-batches.
        profile: Memory costs of the layers.
        micro_batches: Micro-batches of a batch.
    """
    shared = profile.shared_bytes
    if plan.vocabulary_tile is None:
        return micro_batches * shared
    # Those in pieces are there once: of the last layer as a whole, and the rows of embeddings, which are no more.
    ties = {tie.number: tie.gradient_bytes for layer in (profile.layers[0], profile.layers[-1]) for tie in layer.ties}
    once = max(profile.layers[0].gradient_bytes, profile.layers[-1].gradient_bytes) + profile.layers[-1].gradient_bytes
    return micro_batches * max(0, shared - sum(ties.values())) + once


def fixed_outputs_bytes(workload: Workload, plan: Plan) -> int:
    """Return the most bytes of the outputs that frozen layers write once: those of a partition, and its inputs where these are such too.

    Args:
        workload: Model, data and method.
        plan: Partitions and their micro-batches.
    """
    sizes = [activation_bytes(workload, stop) for _, stop in plan.spans if stop <= workload.fixed_layers]
    if not sizes:
        return 0
    samples, labels = len(workload.splits["train"]), 8 * workload.rows_per_sample
    return samples * (_largest_neighbours(sizes) + 2 * labels) + _header_bytes(workload, plan, samples, "float32")


def check_disk(workload: Workload, plan: Plan, profile: MemoryProfile) -> None:
    """Refuse a run that would exceed `--max-disk`.

    Args:
        workload: Model, data and method.
        plan: Partitions and their micro-batches.
        profile: Memory costs of the layers.

    Raises:
        DiskError: The run may need more.
    """
    limit, needed = workload.config.max_disk, disk_bytes(workload, plan, profile)
    if limit is not None and needed > limit:
        fixed = fixed_outputs_bytes(workload, plan)
        cached = f", or --no-cache-frozen ({format_bytes(fixed)} less)" if fixed else ""
        cached += f", or --recompute always ({format_bytes(plan.kept_bytes)} less)" if plan.kept_bytes else ""
        raise DiskError(
            f"the run needs up to {format_bytes(needed)} on disk, above --max-disk {format_bytes(limit)}; give more{cached}"
        )


def disk_notes(workload: Workload, plan: Plan, profile: MemoryProfile, free_bytes: int | None) -> list[str]:
    """Return what is said of a run that may need more than is free on the disk.

    Args:
        workload: Model, data and method.
        plan: Partitions and their micro-batches.
        profile: Memory costs of the layers.
        free_bytes: Bytes that are free where its folder is to be; None where nobody has looked.
    """
    if free_bytes is None or (needed := disk_bytes(workload, plan, profile)) <= free_bytes:
        return []
    less = f", or give --recompute always ({format_bytes(plan.kept_bytes)} less)" if plan.kept_bytes else ""
    return [
        f"the run needs up to {format_bytes(needed)} on disk, and {format_bytes(free_bytes)} are free there: make room, give a --workdir on "
        f"another disk{less}, or it may end where the disk is full"
    ]


def free_disk_bytes(folder: Path) -> int | None:
    """Return the bytes that are free on the disk where a folder is, or is to be; None where that cannot be told.

    Args:
        folder: The folder, which need not exist.
    """
    for place in (folder.absolute(), *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def activation_bytes(workload: Workload, boundary: int) -> int:
    """Return the bytes of one sample in the store that the partition after a boundary learns from.

    Args:
        workload: Model and data, and the encoding of the activations.
        boundary: Number of the boundary.
    """
    return sum(encoded_bytes(spec, workload.config.activation_dtype) for spec in workload.chain.boundaries[boundary])


def num_stored_samples(workload: Workload) -> int:
    """Return the number of samples in the stores of a boundary that training reads: every view of the training samples, and others."""
    views = workload.config.views
    return sum(size * (views if name == "train" else 1) for name, size in workload.training_splits.items())


def num_evaluated_samples(workload: Workload) -> int:
    """Return the number of samples in the largest split that the whole model is evaluated on."""
    return max((len(workload.splits[name]) for name in ("val", "test") if name in workload.splits), default=0)


def _header_bytes(workload: Workload, plan: Plan, samples: int, encoding: Encoding) -> int:
    """Return the bytes of two stores' headers: a page for each shard."""
    shard_bytes, labels = BufferSizes.of_budget(plan.budget_bytes).shard_bytes, workload.dataset.targets.spec
    boundaries = [workload.chain.boundaries[part.stop] for part in plan.partitions[:-1]] if samples else []
    shards = [math.ceil(samples / samples_per_shard(specs, samples, shard_bytes, labels, encoding)) for specs in boundaries]
    # Each split of the data ends in a shard that is not full.
    return 2 * PAGE_BYTES * (max(shards, default=0) + len(workload.splits))


def _largest_neighbours(outputs: Sequence[int]) -> int:
    """Return the most bytes of a partition's inputs and outputs together, from those of the boundaries between partitions."""
    return max((left + right for left, right in zip([0, *outputs], [*outputs, 0], strict=True)), default=0)

"""Plans for workloads: the planner's program, fed with what a run needs beside its partitions, and what it will take on disk."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import nn

from lowmem_pnn.config.checks import check_lengths
from lowmem_pnn.config.fit_config import LARGEST_AUTO_BATCH
from lowmem_pnn.device import Device
from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.device.kernel_memory import MATMUL_PACKING_BYTES
from lowmem_pnn.errors import BudgetError, ConfigError, DiskError
from lowmem_pnn.model.layer import gradients_complete_at_once, is_rowwise
from lowmem_pnn.partition_plan import PartitionPlan, Plan
from lowmem_pnn.planning import planner
from lowmem_pnn.planning.footprint import (
    activation_bytes,
    beside_bytes,
    check_disk,
    disk_bytes,
    objective_memory,
    reading_bytes,
    stream_bytes,
    sweep_bytes,
)
from lowmem_pnn.planning.neuroflux_blocks import similar_batch_cuts
from lowmem_pnn.planning.search import GOOD_MICRO_BATCH
from lowmem_pnn.planning.time_estimate import TimeEstimator
from lowmem_pnn.profiling.costs import MemoryProfile, with_chunked_loss, with_step_in_backward, with_streamed_state
from lowmem_pnn.reporting.plan_report import PlanReport
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload

# A layer's Python objects: modules, graph, code. Measured: 4 to 7 MB for a multilayer perceptron of 65 layers.
_STRUCTURE_BYTES = 64_000


# Predicted seconds of a whole training by a plan.
SecondsOf = Callable[[Plan], float]


def make_plan(
    workload: Workload,
    profile: MemoryProfile,
    device: Device,
    unexplained_bytes: int = 0,
    seconds_of: SecondsOf | None = None,
) -> Plan:
    """Cut a workload's chain to fit a device.

    Args:
        workload: model, data and method.
        profile: what its layers cost.
        device: open; its budget is the plan's.
        unexplained_bytes: what a measurement showed above the prediction, to be kept free too.
        seconds_of: asked where the configuration wants the plan that takes least time, by measurement.

    Returns:
        A plan whose predicted peaks are without the device's reserve.

    Raises:
        BudgetError: nothing fits.
        ConfigError: cuts or lists that the model cannot have.
    """
    config = workload.config
    if config.plan_for == "time":
        assert seconds_of is not None, "whoever plans for time can tell it"
        return _fastest(workload, profile, device, unexplained_bytes, seconds_of)
    if config.plan_for == "auto" and _is_free(workload):
        return _fastest(workload, profile, device, unexplained_bytes, TimeEstimator.nominal(workload, profile, device))
    if config.batch_size != "auto":
        return _make_plan(workload, profile, device, unexplained_bytes, config.batch_sizes)
    # Two batches wait on the host beside a partition: the fewer samples a batch may have, the more room is left for them.
    plans: list[Plan] = []
    for most in (LARGEST_AUTO_BATCH >> shift for shift in range(LARGEST_AUTO_BATCH.bit_length())):
        with suppress(BudgetError):
            plans.append(_make_plan(workload, profile, device, unexplained_bytes, (most,)))
        if plans and min(part.micro_batch for part in plans[-1].partitions) == most:
            break
    if not plans:
        return _make_plan(workload, profile, device, unexplained_bytes, (profile.smallest_micro_batch,))
    plan = max(plans, key=lambda plan: min(part.micro_batch for part in plan.partitions))
    samples = len(workload.splits["train"])
    sizes = [min(part.micro_batch, samples) for part in plan.partitions]
    partitions = (
        dataclasses.replace(part, batch=size, micro_batch=size) for part, size in zip(plan.partitions, sizes, strict=True)
    )
    return dataclasses.replace(plan, partitions=tuple(partitions))


def _is_free(workload: Workload) -> bool:
    """Whether training comes to the same by any plan, up to rounding, and there is something to choose."""
    config, layers = workload.config, workload.chain.layers
    if not workload.method.sweeps or config.batch_size == "auto" or config.cuts is not None or config.partitions is not None:
        return False
    # These say something of each partition, or of the last ones.
    if config.recovery_epochs or len(config.lr) > 1 or len(config.optimizer) > 1:
        return False
    # Code is not made for single samples.
    if config.compile:
        return False
    # BatchNorm sees a micro-batch, and the more samples the better.
    kinds = nn.modules.batchnorm._NormBase
    return not any(isinstance(module, kinds) for layer in layers for module in layer.module.modules())


def _fastest(workload: Workload, profile: MemoryProfile, device: Device, unexplained_bytes: int, seconds_of: SecondsOf) -> Plan:
    """The plan of least predicted time; of equal ones that with the fewest partitions.

    Candidates are the planner's own plans, for every least micro-batch (larger ones want more partitions), and for one and two
    partitions more than these, which may take larger micro-batches still.
    """
    batch_sizes = workload.config.batch_sizes
    most = min(max(batch_sizes), workload.config.micro_batch or max(batch_sizes))
    found: dict[Plan, None] = {}
    reached = 0
    for floor in (1 << shift for shift in range(most.bit_length())):
        if floor <= reached:  # the plan before has such micro-batches already
            continue
        # Where the first does not fit, none does. Lists may be for another number of partitions than this plan's.
        with suppress(ConfigError):
            plan = _make_plan(workload, profile, device, unexplained_bytes, batch_sizes, floor)
            found[plan] = None
            reached = min(part.micro_batch for part in plan.partitions)
    if not found:
        return _make_plan(workload, profile, device, unexplained_bytes, batch_sizes)  # which says what is wrong
    if workload.method.num_partitions is None and workload.config.blocks == "planner":
        counts = {len(plan.partitions) for plan in found}
        for number in sorted({count + more for count in counts for more in (1, 2)} - counts):
            with suppress(BudgetError, ConfigError):  # a chain has only so many layers
                found[_make_plan(workload, profile, device, unexplained_bytes, batch_sizes, None, number)] = None
    return min(found, key=lambda plan: (seconds_of(plan), len(plan.partitions)))


def _make_plan(
    workload: Workload,
    profile: MemoryProfile,
    device: Device,
    unexplained_bytes: int,
    batch_sizes: Sequence[int],
    good_micro_batch: int | None = None,
    num_partitions: int | None = None,
) -> Plan:
    """A plan for batches of known sizes, one or one per partition.

    Args:
        workload: see `make_plan`.
        profile: see there.
        device: see there.
        unexplained_bytes: see there.
        batch_sizes: samples a step.
        good_micro_batch: see `planner.plan`; None for what keeps a device busy.
        num_partitions: instead of the method's own wish.
    """
    config, chain = workload.config, workload.chain
    cuts = None if config.cuts is None else [chain.layer_index(cut) for cut in config.cuts]
    batch, sweeps = max(batch_sizes), workload.method.sweeps
    chunk = _loss_chunk(workload, device)
    costs = _costs(workload, profile, chunk, sweeps)

    fixed = device.fixed_bytes + profile.kernel_bytes + unexplained_bytes
    if device.shares_host:
        fixed += torch.get_num_threads() * MATMUL_PACKING_BYTES + len(chain.layers) * _STRUCTURE_BYTES

    def overhead(budget_bytes: int) -> int:
        buffers = BufferSizes.of_budget(budget_bytes)
        beside = max(beside_bytes(workload, profile, device, buffers, boundary, batch) for boundary in range(len(chain.layers)))
        return (
            device.reserve_for(budget_bytes)
            + device.slack_for(budget_bytes)
            + fixed
            + beside
            + (2 * buffers.shard_bytes if device.shares_host else 0)
        )

    if config.blocks == "alike":
        cuts = similar_batch_cuts(
            costs,
            most=min(batch, len(workload.splits["train"])),
            room=device.budget_bytes - overhead(device.budget_bytes),
            objectives=[objective_memory(workload, stop, chunk) for stop in range(1, len(chain.layers) + 1)],
            tolerance=config.block_tolerance,
        )
    plan = planner.plan(
        costs,
        budget_bytes=device.budget_bytes,
        overhead_bytes=overhead,
        batch_sizes=batch_sizes[0] if len(batch_sizes) == 1 else batch_sizes,
        cuts=cuts,
        num_partitions=(num_partitions or workload.method.num_partitions) if cuts is None else None,
        micro_batch=config.micro_batch,
        objective=lambda stop: objective_memory(workload, stop, chunk),
        good_micro_batch=good_micro_batch or _good_micro_batch(workload.rows_per_sample),
        uniform=sweeps,
    )
    check_lengths(config, len(plan.partitions))
    if workload.method.partitions_are_independent:
        _check_cuts_apart(workload, plan)
    partitions = tuple(_refine(workload, profile, costs, device, plan, partition, chunk, fixed) for partition in plan.partitions)
    plan = dataclasses.replace(
        plan,
        partitions=partitions,
        predicted_peak_bytes=max(partition.predicted_peak_bytes for partition in partitions),
        loss_chunk=chunk,
        sweep_micro_batch=partitions[0].micro_batch if sweeps else 0,
    )
    if sweeps:
        return _with_streams(profile, device, plan)
    return plan if not config.recovery_epochs else _with_recovery(workload, profile, device, plan, fixed)


def _with_streams(profile: MemoryProfile, device: Device, plan: Plan) -> Plan:
    """A plan that reads up to twice as far ahead, where it leaves room for that: a partition's first layers are waited for less."""
    window = device.buffer_sizes.stream_bytes
    if not device.shares_host:
        return dataclasses.replace(plan, stream_bytes=window)
    # The check before training may find a little more than was planned, as ever.
    spare = device.budget_bytes - 2 * device.reserve_bytes - plan.predicted_peak_bytes
    longer = window + min(window, max(0, spare) // 2)
    more = 2 * (stream_bytes(profile, longer) - stream_bytes(profile, window))
    partitions = tuple(
        dataclasses.replace(part, predicted_peak_bytes=part.predicted_peak_bytes + more) for part in plan.partitions
    )
    peak = plan.predicted_peak_bytes + more
    return dataclasses.replace(plan, partitions=partitions, predicted_peak_bytes=peak, stream_bytes=longer)


def _check_cuts_apart(workload: Workload, plan: Plan) -> None:
    """Refuse cuts where labels cannot take the place of activations.

    Raises:
        ConfigError: several tensors cross a cut (one that only passes through has no labels that a later partition would see), or one
            that is not float32.
    """
    for part in plan.partitions[1:]:
        specs = workload.chain.boundaries[part.start]
        if len(specs) > 1 or specs[0].dtype != torch.float32:
            name, found = workload.chain.layers[part.start].name, ", ".join(map(str, specs))
            lower = workload.config.precision != "fp32"
            raise ConfigError(
                f"--parallel-sil needs cuts that one float32 tensor crosses, and before layer {name!r} there are {found}"
                f"{f' in --precision {workload.config.precision}' if lower else ''}; give other --cuts, "
                f"{'--precision fp32, ' if lower else ''}or leave --parallel-sil out"
            )


def _good_micro_batch(rows_per_sample: int) -> int:
    """Samples that keep a device busy: a power of two; of tokens as many as make 512, above which gradients are added up seldom enough."""
    if rows_per_sample == 1:
        return GOOD_MICRO_BATCH
    return 1 << max(0, (512 // rows_per_sample).bit_length() - 1)


def _costs(workload: Workload, profile: MemoryProfile, chunk: int | None, sweeps: bool) -> MemoryProfile:
    """What layers cost in the way they are going to be run."""
    layers = list(profile.layers)
    if chunk is not None:
        layers[-1] = with_chunked_loss(layers[-1], chunk / workload.rows_per_sample)
    # Gradients that wait for each other are kept outside of memory in a sweep, and in it elsewhere.
    if workload.config.step_in_backward and (sweeps or not workload.config.steps_wait):
        passing = gradients_complete_at_once(workload.chain.layers, in_chunks=chunk is not None)
        layers = [with_step_in_backward(layer) if alone else layer for layer, alone in zip(layers, passing, strict=True)]
    if sweeps:
        layers = [with_streamed_state(layer) for layer in layers]
    return dataclasses.replace(profile, layers=tuple(layers))


def _loss_chunk(workload: Workload, device: Device) -> int | None:
    """Rows for which the last layer and the loss are computed at once; None for all of a micro-batch."""
    config, chain = workload.config, workload.chain
    if config.loss_chunk is not None:
        return config.loss_chunk if config.loss_chunk < max(config.batch_sizes) * workload.rows_per_sample else None
    if workload.method.learns_per_layer or not is_rowwise(chain.layers[-1]):
        return None
    row_bytes = chain.boundaries[-1][0].sample_bytes // workload.rows_per_sample
    if max(config.batch_sizes) * workload.rows_per_sample * row_bytes <= device.budget_bytes // 16:
        return None
    return max(1, device.budget_bytes // 64 // row_bytes)


def _with_recovery(workload: Workload, profile: MemoryProfile, device: Device, plan: Plan, fixed: int) -> Plan:
    """A plan whose partitions go through sweeps at the end: with micro-batches that fit those too.

    Raises:
        BudgetError: not even the smallest does.
    """
    costs = _costs(workload, profile, plan.loss_chunk, sweeps=True)
    buffers, batch = device.buffer_sizes, plan.partitions[-1].batch
    beside = fixed + device.slack_for(device.budget_bytes) + sweep_bytes(workload, profile, device, buffers, batch)
    size = min(batch, workload.config.micro_batch or batch)
    while True:
        needs = [
            planner.partition_peak(
                costs,
                part.start,
                part.stop,
                size,
                batch,
                objective_memory(workload, part.stop, plan.loss_chunk, sweeps=True),
                beside,
            )
            for part in plan.partitions
        ]
        if max(needs) + device.reserve_bytes <= device.budget_bytes:
            break
        if size <= plan.smallest_micro_batch:
            worst = needs.index(max(needs))
            raise BudgetError(
                f"partition {worst + 1} of {len(needs)} needs {format_bytes(max(needs) + device.reserve_bytes)} in the recovery epochs, "
                f"above the budget of {format_bytes(device.budget_bytes)}; give more --max-gpu-mem, or more --partitions"
            )
        size = max(plan.smallest_micro_batch, size // 2)
    partitions = tuple(
        dataclasses.replace(part, predicted_peak_bytes=max(part.predicted_peak_bytes, need))
        for part, need in zip(plan.partitions, needs, strict=True)
    )
    peak = max(part.predicted_peak_bytes for part in partitions)
    return dataclasses.replace(plan, partitions=partitions, predicted_peak_bytes=peak, sweep_micro_batch=size)


def describe_plan(workload: Workload, profile: MemoryProfile, device: Device, seconds_of: SecondsOf | None = None) -> PlanReport:
    """What a run would come to, or why it cannot be; arguments as for `make_plan`."""
    config = workload.config
    reason, exit_code, partitions, disk, peak = "", 0, [], 0, 0
    try:
        plan = make_plan(workload, profile, device, seconds_of=seconds_of)
        partitions = [describe_partition(workload, part) for part in plan.partitions]
        disk, peak = disk_bytes(workload, plan, profile), plan.predicted_peak_bytes
        check_disk(workload, plan, profile)
    except (BudgetError, DiskError) as error:
        reason, exit_code = str(error), error.exit_code
    return PlanReport(
        method=config.method,
        model=config.model,
        data=config.data,
        device=device.describe(),
        budget_bytes=device.budget_bytes,
        reserve_bytes=device.reserve_bytes,
        training_state_bytes=profile.training_state_bytes,
        predicted_peak_bytes=peak,
        disk_bytes=disk,
        partitions=partitions,
        fits=not reason,
        reason=reason,
        exit_code=exit_code,
    )


def describe_partition(workload: Workload, part: PartitionPlan) -> dict[str, object]:
    """A partition of a plan, for reports."""
    # A sweep keeps the outputs of one batch; else they are written for all samples.
    training = workload.training_splits
    samples = (
        part.batch
        if workload.method.sweeps
        else sum(size * (workload.config.views if name == "train" else 1) for name, size in training.items())
    )
    is_last = part.stop == len(workload.chain.layers)
    return {
        "start": part.start,
        "stop": part.stop,
        "layers": [layer.name for layer in workload.chain.layers[part.start : part.stop]],
        "params": part.num_params,
        "micro_batch": part.micro_batch,
        "batch": part.batch,
        "state_bytes": part.state_bytes,
        "predicted_peak_bytes": part.predicted_peak_bytes,
        "activation_bytes": 0
        if is_last or workload.method.partitions_are_independent
        else samples * activation_bytes(workload, part.stop),
    }


def _refine(
    workload: Workload,
    profile: MemoryProfile,
    costs: MemoryProfile,
    device: Device,
    plan: Plan,
    part: PartitionPlan,
    chunk: int | None,
    fixed: int,
) -> PartitionPlan:
    """The partition with the peak of its own visits, instead of one with the overhead that all partitions keep free."""
    buffers = device.buffer_sizes
    own = beside_bytes(workload, profile, device, buffers, part.start, part.batch)
    learn = part.predicted_peak_bytes - plan.overhead_bytes + own
    layers = costs.layers[part.start : part.stop]
    writing = 0
    if device.shares_host and part.stop < len(profile.layers):
        # Gradients are gone while outputs are written, and two shards are there.
        emit = max(layer.input_bytes.at(part.micro_batch) + layer.emit_peak.at(part.micro_batch) for layer in layers)
        writing = part.state_bytes - sum(layer.gradient_bytes for layer in layers) + emit + 2 * buffers.shard_bytes
        writing += objective_memory(workload, part.stop, chunk).fixed
        writing += reading_bytes(workload, device, buffers, part.start, part.batch)
    state = sum(layer.state_bytes for layer in profile.layers[part.start : part.stop])
    peak = max(learn, writing) + fixed + device.slack_for(device.budget_bytes)
    return dataclasses.replace(part, predicted_peak_bytes=peak, state_bytes=state)

"""Plans for known batch sizes: the chain is cut by the planner, then each partition gets the peak of its own visits."""

import dataclasses
from collections.abc import Sequence

import torch

from lowmem_pnn.config.checks import check_lengths
from lowmem_pnn.config.faults import as_typed
from lowmem_pnn.config.fit_config import recovering
from lowmem_pnn.engine.out_of_memory import halved
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.partition_plan import PartitionPlan, Plan
from lowmem_pnn.planning import planner
from lowmem_pnn.planning.constraints import Constraints
from lowmem_pnn.planning.footprint import Footprint
from lowmem_pnn.planning.heap_share import HeapShare
from lowmem_pnn.planning.kept_products import with_kept_products
from lowmem_pnn.planning.neuroflux_blocks import similar_batch_cuts
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.resident_state import with_resident_state
from lowmem_pnn.profiling.costs import ties_counted_once
from lowmem_pnn.units import format_bytes


def plan_for_batches(
    request: PlanRequest,
    batch_sizes: Sequence[int],
    good_micro_batch: int | None = None,
    num_partitions: int | None = None,
    whole_batches: bool | None = None,
) -> Plan:
    """Make the smallest plan for batches of known sizes; where none fits, one that makes gradients of wide weights in pieces.

    Args:
        request: Workload, layer costs and device.
        batch_sizes: Samples of an optimizer step, one number or one per partition.
        good_micro_batch: Micro-batch as for `planner.plan`; None for one that keeps a device busy.
        num_partitions: Number of partitions; None for the method's own wish.
        whole_batches: Whether a batch has to go through at once; None for the configuration's wish.

    Raises:
        BudgetError: Nothing fits.
        ConfigError: The model cannot have such cuts, or the lists in the configuration do not match the partitions.
    """
    try:
        return _plan(request, batch_sizes, good_micro_batch, num_partitions, whole_batches)
    except BudgetError:
        # What a plan without pieces fits is trained by it: pieces are rounded otherwise, and take longer.
        if num_partitions is not None or request.in_pieces is None:
            raise
    return _plan(request.in_pieces, batch_sizes, good_micro_batch, None, whole_batches)


def _plan(
    request: PlanRequest,
    batch_sizes: Sequence[int],
    good_micro_batch: int | None,
    num_partitions: int | None,
    whole_batches: bool | None,
) -> Plan:
    """Make the smallest plan, its arguments as for `plan_for_batches`."""
    workload, device, batch = request.workload, request.device, max(batch_sizes)

    def overhead_bytes(budget_bytes: int) -> int:
        return Footprint(request, budget_bytes).overhead_bytes

    def beside_bytes(budget_bytes: int) -> list[int]:
        footprint = Footprint(request, budget_bytes)
        return [footprint.beside_bytes(boundary, batch) for boundary in range(request.num_layers)]

    def ending_bytes(budget_bytes: int) -> list[int]:
        footprint = Footprint(request, budget_bytes)
        return [footprint.wide_shard_bytes(stop) for stop in range(1, request.num_layers + 1)]

    def planned(cuts: Sequence[int] | None, *, uniform: bool, num_partitions: int | None = None) -> Plan:
        constraints = Constraints(
            request.costs,
            batch_sizes=batch_sizes[0] if len(batch_sizes) == 1 else batch_sizes,
            cuts=cuts,
            num_partitions=num_partitions,
            micro_batch=workload.config.micro_batch,
            objective=request.objective_memory,
            uniform=uniform,
            whole_batches=request.whole_batches if whole_batches is None else whole_batches,
            overhead_bytes=overhead_bytes,
            beside_bytes=beside_bytes,
            ending_bytes=ending_bytes,
        )
        return planner.plan(constraints, device.budget_bytes, good_micro_batch or request.good_micro_batch)

    cuts = request.cuts
    if workload.config.blocks == "alike":
        cuts = similar_batch_cuts(
            request.costs,
            most=min(batch, len(workload.splits["train"])),
            room=device.budget_bytes - overhead_bytes(device.budget_bytes) - max(beside_bytes(device.budget_bytes)),
            objectives=[request.objective_memory(stop) for stop in range(1, request.num_layers + 1)],
            tolerance=workload.config.block_tolerance,
        )
    asked = (num_partitions or workload.method.num_partitions) if cuts is None else None
    plan = planned(cuts, uniform=workload.method.sweeps, num_partitions=asked)
    if (fixed := _cut_after_fixed_layers(request, plan)) is not None:
        plan = planned(fixed, uniform=True)
    if request.vocabulary_tile and (last := request.num_layers - 1) not in plan.cuts:
        # The last layer by itself takes a whole batch, of which the layers before it need know nothing.
        plan = planned(sorted({*plan.cuts, last}), uniform=True)
    check_lengths(workload.config, len(plan.partitions))
    if workload.config.recovery_epochs:
        _check_recovery(request, plan)
    if workload.method.partitions_are_independent:
        _check_synthetic_inputs(request, plan)
    plan = dataclasses.replace(_with_own_peaks(request, plan), loss_chunk=request.loss_chunk)
    plan = dataclasses.replace(plan, vocabulary_tile=request.vocabulary_tile)
    if workload.method.sweeps:
        # What stays need not be streamed: it comes before longer streams.
        plan = with_resident_state(request, dataclasses.replace(plan, sweep_micro_batch=plan.partitions[0].micro_batch))
        return with_kept_products(request, _with_longer_streams(request, plan))
    return with_kept_products(request, _with_recovery(request, plan)) if workload.config.recovery_epochs else plan


def _cut_after_fixed_layers(request: PlanRequest, plan: Plan) -> list[int] | None:
    """Return the cuts of a plan with one more after the layers whose outputs are written once; None where that is not to be.

    A partition that is cut in two needs no more memory in either part.
    """
    config, after = request.workload.config, request.workload.fixed_layers
    asked = config.cuts is not None or config.partitions is not None
    per_partition = any(len(values) > 1 for values in (config.optimizer, config.lr))
    if not after or asked or per_partition or after in plan.cuts or after in request.costs.forbidden_cuts:
        return None
    return sorted({*plan.cuts, after})


def _check_recovery(request: PlanRequest, plan: Plan) -> None:
    """Refuse recovery epochs in which no weight would move, or a tied one by a part of its gradient.

    Raises:
        ConfigError: All that recover are frozen, or a weight of theirs is tied to a partition that does not recover.
    """
    workload, count = request.workload, len(plan.partitions)
    learning = [number for number, span in enumerate(plan.spans) if any(workload.learns[slice(*span)])]
    if (chosen := recovering(workload.config, count)) and not set(chosen) & set(learning):
        frozen, able = (as_typed(tuple(number + 1 for number in numbers)) for numbers in (chosen, learning))
        raise ConfigError(
            f"--recovery-epochs would train nothing: all weights of partition{'s' if len(chosen) > 1 else ''} {frozen} are frozen; give "
            f"--recover {able}, or leave it out"
        )
    holders: dict[str, set[int]] = {}
    for number, span in enumerate(plan.spans):
        for name, one in (
            (name, one) for layer in workload.chain.layers[slice(*span)] for name, one in layer.parameters().items()
        ):
            if one.requires_grad:
                holders.setdefault(workload.chain.owner_of(name), set()).add(number)
    for name, numbers in holders.items():
        if chosen and 0 < len(numbers & set(chosen)) < len(numbers):
            both, all_of_them = (
                as_typed(tuple(number + 1 for number in sorted(some))) for some in (numbers, numbers | set(chosen))
            )
            raise ConfigError(
                f"--recovery-epochs would train {name!r} by a part of its gradient: it is tied in partitions {both}, of which not all "
                f"recover; give --recover {all_of_them}"
            )


def _check_synthetic_inputs(request: PlanRequest, plan: Plan) -> None:
    """Refuse cuts where synthetic labels cannot take the place of activations.

    Raises:
        ConfigError: Several tensors cross a cut (one that only passes through has no labels that a later partition would see), or one
            that is not float32.
    """
    chain, precision = request.workload.chain, request.workload.config.precision
    for part in plan.partitions[1:]:
        specs = chain.boundaries[part.start]
        if len(specs) > 1 or specs[0].dtype != torch.float32:
            name, tensors = chain.layers[part.start].name, ", ".join(map(str, specs))
            lower = precision != "fp32"
            raise ConfigError(
                f"--parallel-sil needs cuts that one float32 tensor crosses, and before layer {name!r} there are {tensors}"
                f"{f' in --precision {precision}' if lower else ''}; give other --cuts, "
                f"{'--precision fp32, ' if lower else ''}or leave --parallel-sil out"
            )


def _with_own_peaks(request: PlanRequest, plan: Plan) -> Plan:
    """Replace the overhead that all partitions keep free by the bytes that each partition's own visits need."""
    footprint = Footprint.of(request)
    heap = HeapShare(footprint)
    return _with_partitions(plan, [_with_own_peak(footprint, heap, plan, part) for part in plan.partitions])


def _with_own_peak(footprint: Footprint, heap: HeapShare, plan: Plan, part: PartitionPlan) -> PartitionPlan:
    request = footprint.request
    beside = footprint.beside_bytes(part.start, part.batch, plan.cuts)
    objective = request.objective_memory(part.stop)
    learning = beside + planner.partition_peak(request.costs, part.start, part.stop, part.micro_batch, part.batch, objective)
    writing = 0
    if footprint.writes_shards and part.stop < request.num_layers:
        # Gradients are freed while outputs are written, and two shards are in memory.
        layers = ties_counted_once(request.costs.layers[part.start : part.stop])
        forward = max(layer.input_bytes.at(part.micro_batch) + layer.emit_peak.at(part.micro_batch) for layer in layers)
        state = part.state_bytes - sum(layer.gradient_bytes for layer in layers)
        shards = footprint.shard_bytes(part.stop)
        writing = state + forward + shards + objective.fixed + footprint.reading_bytes(part.start, part.batch, learns=False)
    return dataclasses.replace(
        part,
        predicted_peak_bytes=max(learning, writing) + footprint.constant_bytes_beside(heap.bytes_of(part, beside)),
        # With the optimizer state that a sweep streams in.
        state_bytes=sum(layer.state_bytes for layer in ties_counted_once(request.profile.layers[part.start : part.stop])),
    )


def _with_longer_streams(request: PlanRequest, plan: Plan) -> Plan:
    """Let a sweep prefetch up to four times as many bytes where the plan leaves room: the first layers of a partition then come sooner.

    Where there is room for more, it prefetches the largest tensor too, which else is read when it is needed.
    """
    device, footprint = request.device, Footprint.of(request)
    window = footprint.buffer_sizes.stream_bytes
    if not device.shares_host:
        return dataclasses.replace(plan, stream_bytes=2 * window)
    # A second reserve, for what the check before training may find above the plan.
    spare = device.budget_bytes - 2 * device.reserve_bytes - plan.predicted_peak_bytes - footprint.waiting_bytes()
    room = window + max(0, spare) // 2
    # No longer than what is moved.
    longer = min(room, 4 * window, max(window, footprint.streamed_bytes - plan.resident_bytes))
    if longer < footprint.largest_tensor_bytes <= room:
        longer = footprint.largest_tensor_bytes
    more = footprint.stream_bytes(longer) - footprint.stream_bytes(window)
    partitions = [dataclasses.replace(part, predicted_peak_bytes=part.predicted_peak_bytes + more) for part in plan.partitions]
    waiting = footprint.waiting_bytes(longer)
    return dataclasses.replace(_with_partitions(plan, partitions), stream_bytes=longer, waiting_bytes=waiting)


def _with_recovery(request: PlanRequest, plan: Plan) -> Plan:
    """Give a plan the micro-batch with which its partitions fit the sweeps of the recovery epochs too.

    Raises:
        BudgetError: Not even the smallest micro-batch fits.
    """
    device, footprint, batch = request.device, Footprint.of(request), plan.partitions[-1].batch
    beside = footprint.constant_bytes + footprint.sweep_bytes(batch, plan.cuts)
    # What plans keep free.
    free = device.reserve_bytes + footprint.waiting_bytes()
    size = min(batch, request.workload.config.micro_batch or batch)
    while True:
        peaks = [
            planner.partition_peak(
                request.sweep_costs,
                part.start,
                part.stop,
                size,
                batch,
                request.objective_memory(part.stop, sweeps=True),
                beside,
            )
            for part in plan.partitions
        ]
        if max(peaks) + free <= device.budget_bytes:
            break
        half = None if plan.whole_batches else halved(size, plan.smallest_micro_batch)
        if half is None:
            worst = peaks.index(max(peaks))
            raise BudgetError(
                f"partition {worst + 1} of {len(peaks)} needs {format_bytes(max(peaks) + free)} in the recovery epochs, "
                f"above the budget of {format_bytes(device.budget_bytes)}; give more --max-gpu-mem, or more --partitions"
            )
        size = half
    partitions = [
        dataclasses.replace(part, predicted_peak_bytes=max(part.predicted_peak_bytes, peak))
        for part, peak in zip(plan.partitions, peaks, strict=True)
    ]
    waiting = footprint.waiting_bytes()
    return dataclasses.replace(_with_partitions(plan, partitions), sweep_micro_batch=size, waiting_bytes=waiting)


def _with_partitions(plan: Plan, partitions: Sequence[PartitionPlan]) -> Plan:
    """Replace the partitions of a plan, and with them its predicted peak."""
    peak = max(part.predicted_peak_bytes for part in partitions)
    return dataclasses.replace(plan, partitions=tuple(partitions), predicted_peak_bytes=peak)

"""Descriptions of plans and of their partitions, for reports."""

from collections.abc import Callable, Sequence

from lowmem_pnn.errors import BudgetError, DiskError
from lowmem_pnn.partition_plan import PartitionPlan, Plan
from lowmem_pnn.planning.disk_footprint import activation_bytes, check_disk, disk_bytes, disk_notes, num_stored_samples
from lowmem_pnn.planning.footprint import Footprint
from lowmem_pnn.planning.make_plan import SecondsOf, make_plan
from lowmem_pnn.planning.notes import plan_notes
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.time_estimate import TimeEstimator
from lowmem_pnn.reporting.plan_report import PlanReport
from lowmem_pnn.reporting.tier_table import TierEstimate
from lowmem_pnn.workload import Workload
from lowmem_pnn.workload.plain_training import plain_bytes


def describe_plan(
    request: PlanRequest,
    seconds_of: SecondsOf | None = None,
    tiers_of: Callable[[Plan], Sequence[TierEstimate]] = lambda plan: (),
) -> PlanReport:
    """Describe the plan of a run, or say why there is none.

    Args:
        request: As for `make_plan`.
        seconds_of: As for `make_plan`.
        tiers_of: Returns the tiers of a plan on a described device.
    """
    workload, profile, device = request.workload, request.profile, request.device
    batch = max(workload.config.batch_sizes)
    reason, exit_code, partitions, disk, peak, written, notes = "", 0, [], 0, 0, None, []
    tiers: Sequence[TierEstimate] = ()
    try:
        plan = make_plan(request, seconds_of)
        partitions = [
            {**describe_partition(workload, part), "ahead_bytes": ahead_bytes(request, plan, part)} for part in plan.partitions
        ]
        batch = max(part.batch for part in plan.partitions)
        disk, peak = disk_bytes(workload, plan, profile), plan.predicted_peak_bytes
        # The same by any timings.
        written = TimeEstimator.nominal(request).training(plan).bytes_written
        notes = [*plan_notes(request, plan), *disk_notes(workload, plan, profile, request.free_disk_bytes)]
        tiers = tiers_of(plan)
        check_disk(workload, plan, profile)
    except (BudgetError, DiskError) as error:
        reason, exit_code = str(error), error.exit_code
    return PlanReport(
        method=workload.config.method,
        model=workload.config.model,
        data=workload.config.data,
        device=device.describe(),
        budget_bytes=device.budget_bytes,
        reserve_bytes=device.reserve_bytes,
        training_state_bytes=profile.training_state_bytes,
        plain_bytes=plain_bytes(workload, profile, batch),
        predicted_peak_bytes=peak,
        disk_bytes=disk,
        written_bytes=written,
        drive_tbw=workload.config.drive_tbw,
        partitions=partitions,
        fits=not reason,
        reason=reason,
        exit_code=exit_code,
        notes=notes,
        tiers=tiers,
        preprocessing=workload.dataset.preprocessing,
        data_parts=workload.dataset.parts,
        skipped_samples=workload.dataset.skipped_samples,
    )


def ahead_bytes(request: PlanRequest, plan: Plan, part: PartitionPlan) -> int:
    """Return how many bytes of a partition's predicted peak are what is read ahead: samples, and in sweeps weights and state.

    A run may hold as many, where the budget has room for them; it needs less.

    Args:
        request: Request that the plan was made for.
        plan: The plan.
        part: One of its partitions.
    """
    footprint = Footprint.of(request)
    ahead = footprint.beside_bytes(part.start, part.batch, plan.cuts)
    window = footprint.buffer_sizes.stream_bytes
    if request.device.shares_host and plan.stream_bytes > window:
        ahead += footprint.stream_bytes(plan.stream_bytes) - footprint.stream_bytes(window)
    return min(ahead, part.predicted_peak_bytes)


def describe_partition(workload: Workload, part: PartitionPlan) -> dict[str, object]:
    """Describe a partition of a plan.

    Args:
        workload: Model, data and method.
        part: The partition.
    """
    # A sweep keeps the outputs of one batch; else outputs are written for all samples.
    samples = part.batch if workload.method.sweeps else num_stored_samples(workload)
    has_store = part.stop < len(workload.chain.layers) and not workload.method.partitions_are_independent
    return {
        "start": part.start,
        "stop": part.stop,
        "layers": [layer.name for layer in workload.chain.layers[part.start : part.stop]],
        "params": part.num_params,
        "micro_batch": part.micro_batch,
        "batch": part.batch,
        "state_bytes": part.state_bytes,
        "predicted_peak_bytes": part.predicted_peak_bytes,
        "activation_bytes": samples * activation_bytes(workload, part.stop) if has_store else 0,
    }

"""The header of a run: what is trained, by which plan, in which budget, and what plain training would need; said before the first step."""

from lowmem_pnn.planning.describe import ahead_bytes
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.reporting.advice import plain_fits
from lowmem_pnn.run.run import Run
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload.plain_training import plain_bytes


def describe_start(run: Run, profile: MemoryProfile) -> list[str]:
    """Return what is said of a run before its first step: model, plan and budget, a line each.

    Args:
        run: a run whose plan is final.
        profile: costs of the model's layers.
    """
    workload, plan, device = run.workload, run.plan, run.session.device
    config, parts = workload.config, plan.partitions
    params = sum(part.num_params for part in parts)
    needs = plain_bytes(workload, profile, max(part.batch for part in parts))
    tightest = max(parts, key=lambda part: part.predicted_peak_bytes)
    ahead = ahead_bytes(PlanRequest(workload, profile, device), plan, tightest)
    sizes = sorted({plan.sweep_micro_batch or part.micro_batch for part in parts})
    micro = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    count = "1 partition" if len(parts) == 1 else f"{len(parts)} partitions"
    enough = plain_fits(needs, device.reserve_bytes, device.budget_bytes)
    has_it = ", which this budget has: it trains there without all this" if enough else ""
    plain = "" if needs is None else f"; plain PyTorch needs about {format_bytes(needs)}{has_it}"
    return [
        f"model: {workload.source.spec}, {params:,} parameters, {format_bytes(profile.training_state_bytes)} with gradients and optimizer state",
        f"plan: {config.method}, {count}, micro-batch {micro} of {tightest.batch}; "
        f"needs {format_bytes(tightest.predicted_peak_bytes - ahead)}, and up to {format_bytes(ahead)} more to read ahead",
        f"budget: {format_bytes(device.budget_bytes)} of {device.describe()}{plain}",
    ]

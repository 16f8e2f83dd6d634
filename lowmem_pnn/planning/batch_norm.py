"""BatchNorm under a plan: over how many samples it normalises, and from which budget on over the whole batch."""

from dataclasses import asdict, dataclass

from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.batch_plan import plan_for_batches
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.units import MEGABYTE, format_bytes
from lowmem_pnn.workload import Workload


@dataclass(frozen=True)
class BatchNormUse:
    """What the BatchNorms of a model see of a batch.

    Args:
        layers: number of BatchNorms that see less than the batch.
        samples: samples that they normalise over, at least.
        batch: samples of the batch.
    """

    layers: int
    samples: int
    batch: int

    def __str__(self) -> str:
        """Return it in words."""
        whose = "1 layer normalises" if self.layers == 1 else f"{self.layers} layers normalise"
        return (
            f"BatchNorm: {whose} over {self.samples} of the {self.batch} samples of a batch, and plain PyTorch over all of them"
        )

    def to_dict(self) -> dict[str, int]:
        """Return what `result.json` says of it."""
        return asdict(self)


def batch_norm_use(
    workload: Workload, plan: Plan, micro_batches: list[int] | None = None, sweep_micro_batch: int | None = None
) -> BatchNormUse | None:
    """Return what BatchNorms see of a batch; None where they see all of it, or there are none.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
        micro_batches: present micro-batches of the partitions; None for the plan's.
        sweep_micro_batch: present micro-batch in sweeps; None for the plan's.
    """
    micro_batches = micro_batches or [part.micro_batch for part in plan.partitions]
    sweep_micro_batch = plan.sweep_micro_batch if sweep_micro_batch is None else sweep_micro_batch
    layers, samples, batch = 0, 0, 0
    for part, micro_batch in zip(plan.partitions, micro_batches, strict=True):
        size = sweep_micro_batch if workload.method.sweeps else min(micro_batch, sweep_micro_batch or micro_batch)
        norms = len(workload.batch_norms(part.start, part.stop))
        if norms and size < part.batch:
            samples, batch = min(samples, size) if layers else size, max(batch, part.batch)
            layers += norms
    return BatchNormUse(layers, samples, batch) if layers else None


def batch_norm_note(request: PlanRequest, plan: Plan) -> str | None:
    """Say in one line what BatchNorms see of a batch, and what would let them see all of it; None where they do.

    Args:
        request: workload, layer costs and device.
        plan: plan for the request.
    """
    use = batch_norm_use(request.workload, plan)
    if use is None:
        return None
    try:
        plan_for_batches(request, request.workload.config.batch_sizes, whole_batches=True)
    except ConfigError:
        return f"{use} (--micro-batch {request.workload.config.micro_batch})"
    except BudgetError as error:
        if error.enough_bytes is None:
            return f"{use}; a larger --max-gpu-mem would do"
        enough = format_bytes(-(-error.enough_bytes // MEGABYTE) * MEGABYTE)
        return (
            f"{use}; they see the whole batch from --max-gpu-mem {enough.replace(' ', '')} on (--batch-norm refuse insists on it)"
        )
    return f"{use}; --batch-norm refuse has them see the whole batch in this budget"

"""BatchNorm, and whatever else mixes samples, under a plan: how many it sees, and from which budget on the whole batch."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.partition_plan import PartitionPlan, Plan
from lowmem_pnn.planning.batch_plan import plan_for_batches
from lowmem_pnn.planning.enough import smallest_budget
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.units import format_bytes
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
    layers, samples, batch = 0, 0, 0
    for part, size in _in_pieces(workload, plan, micro_batches, sweep_micro_batch):
        if norms := len(workload.batch_norms(part.start, part.stop)):
            samples, batch = min(samples, size) if layers else size, max(batch, part.batch)
            layers += norms
    return BatchNormUse(layers, samples, batch) if layers else None


def mixing_note(
    workload: Workload,
    plan: Plan,
    mixing: Mapping[str, int],
    micro_batches: list[int] | None = None,
    sweep_micro_batch: int | None = None,
) -> str | None:
    """Say in one line what modules that mix samples see of a batch, beside BatchNorm; None where they see all of it.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
        mixing: such modules, in words, with the numbers of their layers.
        micro_batches: present micro-batches of the partitions; None for the plan's.
        sweep_micro_batch: present micro-batch in sweeps; None for the plan's.
    """
    seen = {
        name: (size, part.batch)
        for part, size in _in_pieces(workload, plan, micro_batches, sweep_micro_batch)
        for name, number in mixing.items()
        if part.start <= number < part.stop
    }
    if not seen:
        return None
    first, (samples, batch) = next(iter(seen)), min(seen.values())
    whose = f"{first} and {len(seen) - 1} more mix" if len(seen) > 1 else f"{first} mixes"
    return f"samples are mixed: {whose} {samples} of the {batch} samples of a batch, and in plain PyTorch all of them"


def _in_pieces(
    workload: Workload, plan: Plan, micro_batches: list[int] | None, sweep_micro_batch: int | None
) -> Iterator[tuple[PartitionPlan, int]]:
    """Yield the partitions through which a batch goes in several micro-batches, with their size."""
    sweep_micro_batch = plan.sweep_micro_batch if sweep_micro_batch is None else sweep_micro_batch
    for part, micro_batch in zip(plan.partitions, micro_batches or [part.micro_batch for part in plan.partitions], strict=True):
        size = sweep_micro_batch if workload.method.sweeps else min(micro_batch, sweep_micro_batch or micro_batch)
        if size < part.batch:
            yield part, size


def whole_batch_notes(request: PlanRequest, plan: Plan, mixing: Mapping[str, int]) -> list[str]:
    """Say in a line each what BatchNorms, and what modules that mix samples, see of a batch, and what would let them see all of it.

    Args:
        request: workload, layer costs and device.
        plan: plan for the request.
        mixing: modules that mix samples, as for `mixing_note`.
    """
    use, mixed = batch_norm_use(request.workload, plan), mixing_note(request.workload, plan, mixing)
    notes = [None if use is None else str(use), mixed]
    return [note + _remedy(request) for note in notes if note is not None]


def _remedy(request: PlanRequest) -> str:
    """Return what would let a batch go through at once, as the end of a note."""
    try:
        _plan_whole_batches(request)
    except ConfigError:
        return f" (--micro-batch {request.workload.config.micro_batch})"
    except BudgetError as error:
        enough = smallest_budget(request, _plan_whole_batches, error.enough_bytes or request.device.budget_bytes)
        if enough is None:
            return "; a larger --max-gpu-mem would do"
        named = format_bytes(enough).replace(" ", "")
        return f"; they see the whole batch from --max-gpu-mem {named} on (--batch-norm refuse insists on it)"
    return "; --batch-norm refuse has them see the whole batch in this budget"


def _plan_whole_batches(request: PlanRequest) -> Plan:
    # As it is planned with that option: what an evaluation reads is counted otherwise too.
    workload = request.workload
    insisting = replace(request, workload=replace(workload, config=replace(workload.config, batch_norm="refuse")))
    return plan_for_batches(insisting, workload.config.batch_sizes, whole_batches=True)

"""Another device or budget than a run had, for what comes after training: its options there, and its partitions, divided to fit."""

import dataclasses

from lowmem_pnn.config.configure import checked
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.device.support import is_gpu
from lowmem_pnn.errors import BudgetError
from lowmem_pnn.partition_plan import PartitionPlan, Plan
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload


def options_here(config: FitConfig, max_gpu_mem: str | int | None, device: str | None) -> FitConfig:
    """Return the options of a run for what comes after training, which may be on another machine than the training was.

    Layers run as they are, uncompiled, and on the CPU what only a GPU reads is left out: a run may be used where it could not be begun.

    Args:
        config: options of the run.
        max_gpu_mem: another budget; None for the run's.
        device: another device; None for the run's.

    Raises:
        ConfigError: it is no size, or no device.
    """
    other = {name: value for name, value in (("max_gpu_mem", max_gpu_mem), ("device", device)) if value is not None}
    config = (
        checked({field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | other) if other else config
    )
    config = dataclasses.replace(config, compile=False)
    if is_gpu(config.device):
        return config
    return dataclasses.replace(config, tf32=False, budget_scope="process", max_host_mem=None)


def within(plan: Plan, workload: Workload, budget_bytes: int) -> Plan:
    """Return a run's plan for a smaller budget: partitions whose weights take more than half of it are divided.

    Micro-batches are halved while samples go forward, where they do not fit.

    Args:
        plan: plan of the run.
        workload: its model.
        budget_bytes: the budget.

    Raises:
        BudgetError: a layer alone is larger than the budget.
    """
    sizes = [
        sum(tensor.nbytes for tensor in (*layer.parameters().values(), *layer.buffers().values()))
        for layer in workload.chain.layers
    ]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    if sizes[largest] > budget_bytes:
        raise BudgetError(
            f"layer {workload.chain.layers[largest].name!r} alone has {format_bytes(sizes[largest])} of weights, above the budget of "
            f"{format_bytes(budget_bytes)}; give a larger --max-gpu-mem"
        )
    if budget_bytes >= plan.budget_bytes:
        return plan
    bounds: list[tuple[PartitionPlan, int, int]] = []
    for part in plan.partitions:
        begin, held = part.start, 0
        for layer in range(part.start, part.stop):
            if layer > begin and held + sizes[layer] > budget_bytes // 2:
                bounds.append((part, begin, layer))
                begin, held = layer, 0
            held += sizes[layer]
        bounds.append((part, begin, part.stop))
    # By the bytes of a sample follows how many are read at once.
    widths = [sum(spec.sample_bytes for spec in specs) for specs in workload.chain.boundaries]
    parts = [
        dataclasses.replace(
            part, start=start, stop=stop, input_bytes_per_sample=widths[start], output_bytes_per_sample=widths[stop]
        )
        for part, start, stop in bounds
    ]
    # Nothing mixes the samples of a batch any more: what had to learn from all of it at once goes forward in pieces.
    return dataclasses.replace(plan, partitions=tuple(parts), whole_batches=False)

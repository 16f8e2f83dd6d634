"""Prospects: every method side by side: whether it fits, and what an epoch would take, from rates that are measured here and now."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowmem_pnn.config import METHODS, MethodName
from lowmem_pnn.costs import MemoryProfile
from lowmem_pnn.device import Device
from lowmem_pnn.errors import BudgetError, ConfigError, DiskError
from lowmem_pnn.footprint import activation_bytes, check_disk
from lowmem_pnn.forecast import LayerSeconds, PartitionBytes, Rates, Setting, one_epoch, whole
from lowmem_pnn.options import for_method
from lowmem_pnn.planning import make_plan
from lowmem_pnn.plans import Plan
from lowmem_pnn.profiler import Known
from lowmem_pnn.rates import Bench, machine
from lowmem_pnn.report import Prospect
from lowmem_pnn.workload import IoSizes, Workload, by_other_method, profile_workload


@dataclass(frozen=True)
class _Candidate:
    """A method that fits: what is planned for it."""

    workload: Workload
    profile: MemoryProfile
    plan: Plan


def compare(workload: Workload, profile: MemoryProfile, device: Device, known: Known) -> list[Prospect]:
    """What every method would come to, with the same options where it reads them.

    Args:
        workload: of the method that was asked for.
        profile: of it.
        device: open; layers run on it, within its budget.
        known: what profiling has found so far; added to.

    Returns:
        A row for each method, in the order in which the option lists them.
    """
    found = [_plan_by(method, workload, profile, device, known) for method in METHODS]
    rates = dict(_rates([one for one in found if isinstance(one, _Candidate)], device))
    return [one if isinstance(one, Prospect) else _prospect(one, workload, rates[one.workload.config.method]) for one in found]


def _plan_by(method: MethodName, asked: Workload, profile: MemoryProfile, device: Device, known: Known) -> _Candidate | Prospect:
    """A method's plan, or why there is none."""
    is_asked = method == asked.config.method
    try:
        workload = asked if is_asked else by_other_method(asked, for_method(asked.config, method))
        own = profile if is_asked else profile_workload(workload, device, known)
        plan = make_plan(workload, own, device)
        check_disk(workload, plan, own)
        return _Candidate(workload, own, plan)
    except BudgetError as error:
        return Prospect(method=method, asked=is_asked, reason=str(error), enough_bytes=error.enough_bytes)
    except (ConfigError, DiskError) as error:
        return Prospect(method=method, asked=is_asked, reason=str(error))


def _rates(candidates: list[_Candidate], device: Device) -> Iterator[tuple[str, Rates]]:
    """What each method's forecast is made from: layers that are alike are timed once for all of them."""
    if not candidates:
        return
    bench = Bench(device)
    most = max(max(part.micro_batch for part in one.plan.partitions) for one in candidates)
    room = (device.budget_bytes - device.reserve_bytes) // 2
    timed: dict[bool, tuple[tuple[LayerSeconds, ...], float]] = {}
    moved = machine(device, candidates[0].workload.optimizer(0), Path.cwd(), room)
    for one in candidates:
        by_units = one.workload.method.learns_by_units
        if by_units not in timed:
            timed[by_units] = bench.layers(one.workload.chain, one.profile, most, by_units=by_units)
        layers, share = timed[by_units]
        yield one.workload.config.method, Rates(layers, *moved, share)


def _prospect(one: _Candidate, asked: Workload, rates: Rates) -> Prospect:
    workload, plan, config = one.workload, one.plan, one.workload.config
    setting = setting_of(workload, one.profile, plan)
    program = workload.method.program(len(plan.partitions), workload.training_splits)
    epoch, total = one_epoch(program, plan, setting, rates), whole(program, plan, setting, rates)
    sizes = [part.micro_batch for part in plan.partitions]
    return Prospect(
        method=config.method,
        asked=config.method == asked.config.method,
        fits=True,
        partitions=len(plan.partitions),
        micro_batches=(min(sizes), max(sizes)),
        predicted_peak_bytes=plan.predicted_peak_bytes,
        seconds_per_epoch=epoch.seconds,
        seconds=total.seconds,
        bytes_read_per_epoch=epoch.read,
        bytes_written_per_epoch=epoch.written,
        measured_share=rates.measured,
    )


def setting_of(workload: Workload, profile: MemoryProfile, plan: Plan) -> Setting:
    """What a forecast needs to know of a workload.

    Args:
        workload: model, data and method.
        profile: what its layers cost.
        plan: how it is cut.
    """
    io = IoSizes.of_budget(plan.budget_bytes)
    partitions = []
    for part in plan.partitions:
        layers = profile.layers[part.start : part.stop]
        buffers = sum(layer.buffer_bytes for layer in layers)
        partitions.append(
            PartitionBytes(
                weights=buffers + sum(layer.weight_bytes for layer in layers),
                buffers=buffers,
                trainable=sum(layer.gradient_bytes for layer in layers),
                optimizer=sum(layer.optimizer_bytes for layer in layers),
                inputs=activation_bytes(workload, part.start),
                outputs=part.output_bytes_per_sample,
                kept=activation_bytes(workload, part.stop),
            )
        )
    return Setting(
        partitions,
        workload.training_splits,
        by_units=workload.method.learns_by_units,
        stream_bytes=io.stream_bytes,
        boundary_bytes=io.boundary_bytes,
        window_bytes=io.window_bytes,
    )

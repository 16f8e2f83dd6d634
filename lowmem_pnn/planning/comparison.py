"""Prospects: every method side by side: whether it fits, and what an epoch would take, from rates that are measured here and now."""

from lowmem_pnn.config.configure import for_method
from lowmem_pnn.config.fit_config import METHODS, MethodName
from lowmem_pnn.errors import BudgetError, ConfigError, DiskError
from lowmem_pnn.planning.footprint import check_disk
from lowmem_pnn.planning.make_plan import make_plan
from lowmem_pnn.planning.time_estimate import TimeEstimator
from lowmem_pnn.profiling.benchmark import LayerBenchmark
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.profiling.profiler import MeasurementCache
from lowmem_pnn.reporting.method_estimate import MethodEstimate
from lowmem_pnn.workload import Workload, by_other_method, profile_workload


def compare(workload: Workload, profile: MemoryProfile, bench: LayerBenchmark, cache: MeasurementCache) -> list[MethodEstimate]:
    """What every method would come to, with the same options where it reads them.

    Args:
        workload: of the method that was asked for.
        profile: of it.
        bench: layers that are alike are timed once for all methods.
        cache: measurements of profiles so far; new ones are added.

    Returns:
        A row for each method, in the order in which the option lists them.
    """
    return [_by(method, workload, profile, bench, cache) for method in METHODS]


def _by(
    method: MethodName, asked: Workload, profile: MemoryProfile, bench: LayerBenchmark, cache: MeasurementCache
) -> MethodEstimate:
    """One method's row."""
    is_asked, device = method == asked.config.method, bench.device
    try:
        workload = asked if is_asked else by_other_method(asked, for_method(asked.config, method))
        own = profile if is_asked else profile_workload(workload, device, cache)
        clock = TimeEstimator.measured(workload, own, device, bench)
        plan = make_plan(workload, own, device, seconds_of=clock)
        check_disk(workload, plan, own)
    except BudgetError as error:
        return MethodEstimate(method=method, asked=is_asked, reason=str(error), enough_bytes=error.enough_bytes)
    except (ConfigError, DiskError) as error:
        return MethodEstimate(method=method, asked=is_asked, reason=str(error))
    epoch = clock.epoch(plan)
    sizes = [part.micro_batch for part in plan.partitions]
    return MethodEstimate(
        method=method,
        asked=is_asked,
        fits=True,
        partitions=len(plan.partitions),
        micro_batches=(min(sizes), max(sizes)),
        predicted_peak_bytes=plan.predicted_peak_bytes,
        seconds_per_epoch=epoch.seconds,
        seconds=clock(plan),
        bytes_read_per_epoch=epoch.read,
        bytes_written_per_epoch=epoch.written,
        measured_share=clock.rates.measured_share,
    )

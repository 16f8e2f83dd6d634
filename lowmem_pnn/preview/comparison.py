"""The comparison of methods: whether each one fits, and how long an epoch takes, from measured timings."""

from collections.abc import Callable

from lowmem_pnn.config.configure import for_method
from lowmem_pnn.config.fit_config import METHODS, MethodName
from lowmem_pnn.errors import BudgetError, ConfigError, DiskError
from lowmem_pnn.planning.disk_footprint import check_disk
from lowmem_pnn.planning.make_plan import make_plan, smallest_budget_of
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.time_estimate import TimeEstimator
from lowmem_pnn.profiling.memory_profiler import MeasurementCache
from lowmem_pnn.reporting.method_estimate import MethodEstimate
from lowmem_pnn.workload import by_other_method, profile_workload

EstimatorOf = Callable[[PlanRequest], TimeEstimator]
"""Function that returns the estimator of a request."""


def compare_methods(asked: PlanRequest, estimator_of: EstimatorOf, cache: MeasurementCache) -> list[MethodEstimate]:
    """Estimate training by every method, with the options that the method reads.

    Args:
        asked: Request of the method that was asked for.
        estimator_of: Returns the estimator of a method's request.
        cache: Measurements of earlier profiles of the model; new ones are added.

    Returns:
        An estimate for each method, in the order of `METHODS`.
    """
    return [_estimate(method, asked, estimator_of, cache) for method in METHODS]


def _estimate(method: MethodName, asked: PlanRequest, estimator_of: EstimatorOf, cache: MeasurementCache) -> MethodEstimate:
    config = asked.workload.config
    is_asked = method == config.method
    try:
        request = asked
        if not is_asked:
            workload = by_other_method(asked.workload, for_method(config, method))
            profile = profile_workload(workload, asked.device, cache)
            request = PlanRequest(workload, profile, asked.device, free_disk_bytes=asked.free_disk_bytes)
        estimator = estimator_of(request)
        plan = make_plan(request, estimator)
        check_disk(request.workload, plan, request.profile)
    except BudgetError as error:
        return MethodEstimate(method=method, asked=is_asked, reason=str(error), enough_bytes=error.enough_bytes)
    except (ConfigError, DiskError) as error:
        return MethodEstimate(method=method, asked=is_asked, reason=str(error))
    epoch = estimator.epoch(plan)
    sizes = [part.micro_batch for part in plan.partitions]
    return MethodEstimate(
        method=method,
        asked=is_asked,
        fits=True,
        enough_bytes=smallest_budget_of(request),
        partitions=len(plan.partitions),
        micro_batches=(min(sizes), max(sizes)),
        predicted_peak_bytes=plan.predicted_peak_bytes,
        seconds_per_epoch=epoch.seconds,
        seconds=estimator(plan),
        bytes_read_per_epoch=epoch.bytes_read,
        bytes_written_per_epoch=epoch.bytes_written,
        measured_share=estimator.timings.measured_share,
    )

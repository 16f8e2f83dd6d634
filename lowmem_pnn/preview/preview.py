"""The preview of a run: its plan, and all methods side by side, in one budget or in several; nothing is trained or kept."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lowmem_pnn.compilation.compiler import check_compiler
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.gpu_description import GpuDescription
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.planning.describe import describe_plan
from lowmem_pnn.planning.disk_footprint import free_disk_bytes
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.time_estimate import TimeEstimator
from lowmem_pnn.preview.comparison import compare_methods
from lowmem_pnn.preview.tiers import estimate_tiers
from lowmem_pnn.profiling.benchmark import LayerBenchmark
from lowmem_pnn.profiling.memory_profiler import MeasurementCache
from lowmem_pnn.reporting.plan_report import PlanReport
from lowmem_pnn.run.only_run import only_run
from lowmem_pnn.training.setup import open_workload
from lowmem_pnn.training.start import OpenInputs
from lowmem_pnn.workload import profile_workload
from lowmem_pnn.workload.inputs import Inputs, named_inputs


def preview(
    config: FitConfig, open_inputs: OpenInputs = named_inputs, *, timing: bool = True, gpu: GpuDescription | None = None
) -> PlanReport:
    """Return the plan of a run.

    Args:
        config: options of the run.
        open_inputs: opens model and data; by default those that the options name.
        timing: time layers, and show all methods side by side.
        gpu: GPU to plan for, which is not here; its times are computed.
    """
    return previews(config, [config.max_gpu_mem], open_inputs, timing=timing, gpu=gpu)[0]


def previews(
    config: FitConfig,
    budgets: Sequence[int],
    open_inputs: OpenInputs = named_inputs,
    *,
    timing: bool = True,
    gpu: GpuDescription | None = None,
) -> list[PlanReport]:
    """Return the plans of a run in several budgets; model and data are opened once.

    Args:
        config: options of the run.
        budgets: budgets in bytes, which take the place of the options'.
        open_inputs: opens model and data; by default those that the options name.
        timing: time layers, and show all methods side by side.
        gpu: GPU to plan for, which is not here; its times are computed.

    Raises:
        BusyError: another thread has a run.
        BudgetError: the device can have none of the budgets.
    """
    if config.plan_for == "time" and not timing and gpu is None:
        raise ConfigError("--plan-for time goes by layers that are timed, and --no-timing times none; leave one of them out")
    if config.compile:
        check_compiler()
    cache = MeasurementCache()
    found: list[PlanReport | tuple[int, BudgetError]] = []
    with only_run():
        inputs = open_inputs(config)
        for budget in budgets:
            try:
                found.append(_preview(dataclasses.replace(config, max_gpu_mem=budget), inputs, cache, timing=timing, gpu=gpu))
            except BudgetError as error:
                found.append((budget, error))
    return _with_reasons(found)


def _preview(
    config: FitConfig, inputs: Inputs, cache: MeasurementCache, *, timing: bool, gpu: GpuDescription | None
) -> PlanReport:
    with open_workload(config, inputs, gpu=gpu) as (device, workload):
        # Where a described GPU is, there is another disk.
        free = free_disk_bytes(Path("runs")) if gpu is None else None
        request = PlanRequest(workload, profile_workload(workload, device, cache), device, free_disk_bytes=free)
        benchmark = LayerBenchmark(device)
        estimator_of = (
            partial(TimeEstimator.measured, benchmark=benchmark) if gpu is None else partial(TimeEstimator.of_gpu, gpu=gpu)
        )
        tiers_of = (lambda plan: ()) if gpu is None else partial(estimate_tiers, request, gpu)
        report = describe_plan(request, estimator_of(request), tiers_of)
        # Layers are timed as they are, uncompiled.
        if timing and not config.compile:
            report = dataclasses.replace(report, prospects=compare_methods(request, estimator_of, cache))
    return report


def _with_reasons(found: Sequence[PlanReport | tuple[int, BudgetError]]) -> list[PlanReport]:
    """Return a report for each budget: of one that the device cannot have, such as more than it has, why.

    Raises:
        BudgetError: it can have none of them.
    """
    other = next((each for each in found if isinstance(each, PlanReport)), None)
    if other is None:
        raise next(each[1] for each in found if not isinstance(each, PlanReport))
    without_plan = partial(
        dataclasses.replace, other, reserve_bytes=0, predicted_peak_bytes=0, disk_bytes=0, written_bytes=None, partitions=[], fits=False,
        notes=(), prospects=(), tiers=(),
    )  # fmt: skip
    return [
        each
        if isinstance(each, PlanReport)
        else without_plan(budget_bytes=each[0], reason=str(each[1]), exit_code=each[1].exit_code)
        for each in found
    ]

"""TimeEstimator: predicted seconds of a workload's training by any plan, from measured or nominal timings."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from lowmem_pnn.config.gpu_description import GpuDescription
from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.methods import Sweep, Visit
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.disk_footprint import activation_bytes
from lowmem_pnn.planning.forecast import (
    ForecastInputs,
    PartitionBytes,
    TimeAndTraffic,
    forecast_epoch,
    forecast_training,
)
from lowmem_pnn.planning.kept_products import kept_products
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.profiling import nominal
from lowmem_pnn.profiling.benchmark import LayerBenchmark
from lowmem_pnn.profiling.costs import Product, ties_counted_once
from lowmem_pnn.profiling.timings import MachineTimings


class TimeEstimator:
    """Estimator of the time and disk traffic of a workload's training, by any plan.

    Args:
        request: Workload, layer costs and device.
        find_timings: Function that returns the timings; called when the first estimate is asked for.
    """

    def __init__(self, request: PlanRequest, find_timings: Callable[[], MachineTimings]) -> None:
        self._request, self._find_timings = request, find_timings

    @classmethod
    def measured(cls, request: PlanRequest, benchmark: LayerBenchmark | None = None) -> "TimeEstimator":
        """Return an estimator with measured timings: each layer runs with up to as many samples as a batch has.

        Args:
            request: Workload, layer costs and device; the layers run on the device, within its budget.
            benchmark: Benchmark that may have timed some of the layers already; None for a new one.
        """
        timer = LayerBenchmark(request.device) if benchmark is None else benchmark

        def find_timings() -> MachineTimings:
            workload = request.workload
            layers, share = timer.time_layers(
                workload.chain,
                request.profile,
                max(workload.config.batch_sizes),
                per_layer_loss=workload.method.learns_per_layer,
            )
            timings = MachineTimings(layers, *timer.time_machine(workload.optimizer(0), Path.cwd()), share)
            # Freed memory that the allocator keeps would count against the plan.
            request.device.release()
            return timings

        return cls(request, find_timings)

    @classmethod
    def nominal(cls, request: PlanRequest) -> "TimeEstimator":
        """Return an estimator with nominal timings: the same on every machine with a device of this kind."""
        speed = nominal.speed_of(shares_host=request.device.shares_host)
        return cls(request, lambda: nominal.nominal_timings(request.profile, speed))

    @classmethod
    def of_gpu(cls, request: PlanRequest, gpu: GpuDescription) -> "TimeEstimator":
        """Return an estimator with the timings of a described GPU."""
        return cls(request, lambda: nominal.nominal_timings(request.profile, nominal.speed_of_gpu(gpu)))

    @cached_property
    def timings(self) -> MachineTimings:
        """Timings of layers, optimizer, drive and memory."""
        return self._find_timings()

    def epoch(self, plan: Plan) -> TimeAndTraffic:
        """Estimate the time and disk traffic of one epoch over all partitions."""
        return self._forecast(forecast_epoch, plan)

    def training(self, plan: Plan) -> TimeAndTraffic:
        """Estimate the time and disk traffic of the whole training."""
        return self._forecast(forecast_training, plan)

    def __call__(self, plan: Plan) -> float:
        """Estimate the seconds of the whole training."""
        return self.training(plan).seconds

    def _forecast(
        self,
        forecast: Callable[[Sequence[Visit | Sweep], Plan, ForecastInputs, MachineTimings], TimeAndTraffic],
        plan: Plan,
    ) -> TimeAndTraffic:
        workload = self._request.workload
        program = workload.program(plan.spans)
        return forecast(program, plan, forecast_inputs(self._request, plan), self.timings)


def forecast_inputs(request: PlanRequest, plan: Plan) -> ForecastInputs:
    """Return the inputs of a workload's forecast.

    Args:
        request: Workload, layer costs and device.
        plan: Partitions and their micro-batches.
    """
    workload, buffer_sizes = request.workload, BufferSizes.of_budget(plan.budget_bytes)
    rule = nominal.keeping_rule(workload.config.recompute, shares_host=request.device.shares_host)
    kept = {number: kept_products(request.profile.layers[number], rule) for number in plan.kept_layers}
    costs = request.profile.layers
    partitions = []
    for part in plan.partitions:
        layers = ties_counted_once(request.profile.layers[part.start : part.stop])
        buffers = sum(layer.buffer_bytes for layer in layers)
        partitions.append(
            PartitionBytes(
                weights=buffers + sum(layer.weight_bytes for layer in layers),
                buffers=buffers,
                trainable=sum(layer.gradient_bytes for layer in layers),
                optimizer=sum(layer.optimizer_bytes for layer in layers),
                inputs=activation_bytes(workload, part.start),
                outputs=part.output_bytes_per_sample,
                stored_outputs=activation_bytes(workload, part.stop),
                kept=sum(one.nbytes for number in range(part.start, part.stop) for one in kept.get(number, ())),
                resident_weights=sum(
                    costs[layer].gradient_bytes for layer in plan.resident_weights if part.start <= layer < part.stop
                ),
                resident_state=sum(
                    costs[layer].optimizer_bytes for layer in plan.resident_state if part.start <= layer < part.stop
                ),
            )
        )
    return ForecastInputs(
        partitions,
        workload.training_splits,
        per_layer_loss=workload.method.learns_per_layer,
        stream_bytes=plan.stream_bytes or buffer_sizes.stream_bytes,
        boundary_bytes=buffer_sizes.boundary_bytes,
        window_bytes=buffer_sizes.window_bytes,
        kept_shares={number: _share(request.profile.layers[number].products, own) for number, own in kept.items()},
    )


def _share(products: Sequence[Product], kept: Sequence[Product]) -> float:
    """Return the share of some products' multiply-accumulates that the kept ones among them have."""
    return sum(one.macs for one in kept) / max(1, sum(one.macs for one in products))

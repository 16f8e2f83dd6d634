"""Clocks: what a workload's training takes by any plan, from rates that are measured here and now, or from nominal ones."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from lowmem_pnn.device import Device
from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.methods import Sweep, Visit
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.footprint import activation_bytes
from lowmem_pnn.planning.forecast import PartitionBytes, Setting, Work, one_epoch, whole
from lowmem_pnn.profiling import nominal
from lowmem_pnn.profiling.benchmark import LayerBenchmark
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.profiling.timings import MachineTimings
from lowmem_pnn.workload import Workload


class TimeEstimator:
    """Predicted seconds of a workload's whole training, by any plan.

    Args:
        workload: model, data and method.
        profile: what its layers cost.
        find_timings: how fast they are; called when the clock is first asked.
    """

    def __init__(self, workload: Workload, profile: MemoryProfile, find_timings: Callable[[], MachineTimings]) -> None:
        self._workload, self._profile, self._find_rates = workload, profile, find_timings

    @classmethod
    def measured(
        cls, workload: Workload, profile: MemoryProfile, device: Device, bench: LayerBenchmark | None = None
    ) -> "TimeEstimator":
        """A clock whose rates are measured: each layer with up to as many samples as a batch has.

        Args:
            workload: model, data and method.
            profile: what its layers cost.
            device: open; layers run on it, within its budget.
            bench: that has timed some of them already, or None.
        """
        timer = LayerBenchmark(device) if bench is None else bench

        def find_timings() -> MachineTimings:
            most, per_layer_loss = max(workload.config.batch_sizes), workload.method.learns_per_layer
            layers, share = timer.time_layers(workload.chain, profile, most, per_layer_loss=per_layer_loss)
            rates = MachineTimings(layers, *timer.time_machine(workload.optimizer(0), Path.cwd()), share)
            # What is kept free of it for further use is not to stand in the way of what was planned.
            device.release()
            return rates

        return cls(workload, profile, find_timings)

    @classmethod
    def nominal(cls, workload: Workload, profile: MemoryProfile, device: Device) -> "TimeEstimator":
        """A clock that goes the same on every machine with a device of this kind; arguments as for `measured`."""
        machine = nominal.CPU if device.shares_host else nominal.CUDA
        return cls(workload, profile, lambda: nominal.nominal_timings(profile, machine))

    @cached_property
    def rates(self) -> MachineTimings:
        """How fast layers, optimizer and drive are."""
        return self._find_rates()

    def epoch(self, plan: Plan) -> Work:
        """Of an epoch of all partitions."""
        return self._work(one_epoch, plan)

    def __call__(self, plan: Plan) -> float:
        """Seconds of the whole training."""
        return self._work(whole, plan).seconds

    def _work(self, rule: Callable[[Sequence[Visit | Sweep], Plan, Setting, MachineTimings], Work], plan: Plan) -> Work:
        program = self._workload.method.program(len(plan.partitions), self._workload.training_splits)
        return rule(program, plan, setting_of(self._workload, self._profile, plan), self.rates)


def setting_of(workload: Workload, profile: MemoryProfile, plan: Plan) -> Setting:
    """What a forecast needs to know of a workload.

    Args:
        workload: model, data and method.
        profile: what its layers cost.
        plan: how it is cut.
    """
    buffer_sizes = BufferSizes.of_budget(plan.budget_bytes)
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
        per_layer_loss=workload.method.learns_per_layer,
        stream_bytes=plan.stream_bytes or buffer_sizes.stream_bytes,
        boundary_bytes=buffer_sizes.boundary_bytes,
        window_bytes=buffer_sizes.window_bytes,
    )

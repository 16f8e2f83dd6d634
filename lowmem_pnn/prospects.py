"""Prospects: every method side by side: whether it fits, and what an epoch would take, from rates that are measured here and now."""

from pathlib import Path

from lowmem_pnn.config import METHODS, MethodName
from lowmem_pnn.costs import MemoryProfile
from lowmem_pnn.device import Device
from lowmem_pnn.errors import BudgetError, ConfigError, DiskError
from lowmem_pnn.footprint import activation_bytes, check_disk
from lowmem_pnn.forecast import PartitionBytes, Rates, Setting, Work, one_epoch, whole
from lowmem_pnn.options import for_method
from lowmem_pnn.planning import make_plan
from lowmem_pnn.plans import Plan
from lowmem_pnn.profiler import Known
from lowmem_pnn.rates import Bench
from lowmem_pnn.report import Prospect
from lowmem_pnn.workload import IoSizes, Workload, by_other_method, profile_workload


class Clock:
    """Predicted seconds of a workload's whole training, by any plan. Layers are timed when it is first asked.

    Args:
        workload: model, data and method.
        profile: what its layers cost.
        device: open; layers run on it, within its budget.
        bench: that has timed some of them already, or None.
    """

    def __init__(self, workload: Workload, profile: MemoryProfile, device: Device, bench: Bench | None = None) -> None:
        self._workload, self._profile = workload, profile
        self._bench = Bench(device) if bench is None else bench
        self._rates: Rates | None = None

    def rates(self) -> Rates:
        """What was measured: each layer with up to as many samples as a batch has."""
        if self._rates is None:
            method, most = self._workload.method, max(self._workload.config.batch_sizes)
            layers, share = self._bench.layers(self._workload.chain, self._profile, most, by_units=method.learns_by_units)
            self._rates = Rates(layers, *self._bench.machine(self._workload.optimizer(0), Path.cwd()), share)
            # What is kept free of it for further use is not to stand in the way of what was planned.
            self._bench.device.release()
        return self._rates

    def work(self, plan: Plan) -> tuple[Work, Work]:
        """Of an epoch, and of the whole training."""
        method = self._workload.method
        setting = setting_of(self._workload, self._profile, plan)
        program = method.program(len(plan.partitions), self._workload.training_splits)
        return one_epoch(program, plan, setting, self.rates()), whole(program, plan, setting, self.rates())

    def __call__(self, plan: Plan) -> float:
        """Seconds of the whole training."""
        return self.work(plan)[1].seconds


def compare(workload: Workload, profile: MemoryProfile, bench: Bench, known: Known) -> list[Prospect]:
    """What every method would come to, with the same options where it reads them.

    Args:
        workload: of the method that was asked for.
        profile: of it.
        bench: layers that are alike are timed once for all methods.
        known: what profiling has found so far; added to.

    Returns:
        A row for each method, in the order in which the option lists them.
    """
    return [_by(method, workload, profile, bench, known) for method in METHODS]


def _by(method: MethodName, asked: Workload, profile: MemoryProfile, bench: Bench, known: Known) -> Prospect:
    """One method's row."""
    is_asked, device = method == asked.config.method, bench.device
    try:
        workload = asked if is_asked else by_other_method(asked, for_method(asked.config, method))
        own = profile if is_asked else profile_workload(workload, device, known)
        clock = Clock(workload, own, device, bench)
        plan = make_plan(workload, own, device, seconds_of=clock)
        check_disk(workload, plan, own)
    except BudgetError as error:
        return Prospect(method=method, asked=is_asked, reason=str(error), enough_bytes=error.enough_bytes)
    except (ConfigError, DiskError) as error:
        return Prospect(method=method, asked=is_asked, reason=str(error))
    epoch, total = clock.work(plan)
    sizes = [part.micro_batch for part in plan.partitions]
    return Prospect(
        method=method,
        asked=is_asked,
        fits=True,
        partitions=len(plan.partitions),
        micro_batches=(min(sizes), max(sizes)),
        predicted_peak_bytes=plan.predicted_peak_bytes,
        seconds_per_epoch=epoch.seconds,
        seconds=total.seconds,
        bytes_read_per_epoch=epoch.read,
        bytes_written_per_epoch=epoch.written,
        measured_share=clock.rates().measured,
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

"""The measured check before training: the tightest partition does one real step on the device, and the plan is held against it."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lowmem_pnn.device import Device, is_out_of_memory
from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.engine.executor import Executor, SteppedInPart
from lowmem_pnn.errors import BudgetError, CaptureError, LowMemError
from lowmem_pnn.methods import Sweep
from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.footprint import beside_bytes, stream_bytes
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.run.run import Run
from lowmem_pnn.sweep.sweeper import Sweeper
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload


@dataclass(frozen=True)
class Check:
    """Prediction and measurement of one partition's step, in bytes above the floor.

    Args:
        partition: its number.
        predicted_bytes: by the plan, for what the check does (it reads no shards).
        measured_bytes: the most that was in use.
        fits: whether the step went through at the planned micro-batch.
        micro_batch: with which it went through, be it after shrinking; None if it did not at all.
    """

    partition: int
    predicted_bytes: int
    measured_bytes: int
    fits: bool
    micro_batch: int | None

    @property
    def unexplained_bytes(self) -> int:
        """Measured less predicted: what fake tensors do not show, such as a library's scratch memory."""
        return self.measured_bytes - self.predicted_bytes

    def describe(self) -> str:
        """One line for people."""
        what = "went through" if self.fits else "did not fit"
        return (
            f"a step of partition {self.partition + 1} {what}: predicted {format_bytes(self.predicted_bytes)}, "
            f"measured {format_bytes(self.measured_bytes)}"
        )

    def to_dict(self) -> dict[str, int]:
        """For `result.json`."""
        return {
            "partition": self.partition,
            "predicted_bytes": self.predicted_bytes,
            "measured_bytes": self.measured_bytes,
            "unexplained_bytes": self.unexplained_bytes,
        }


def check_tightest(run: Run, workload: Workload, plan: Plan, costs: MemoryProfile, device: Device) -> Check:
    """Run one step of the partition with the highest predicted peak, on zeros, and forget it.

    Args:
        run: at its beginning; nothing of it is changed.
        workload: what is trained.
        plan: to be checked.
        costs: of the layers.
        device: open.

    Raises:
        CaptureError: the model raises on real tensors.
    """
    numbers = range(len(plan.partitions)) if run.state.ranks == 1 else [run.state.rank]
    number = max(numbers, key=lambda number: plan.partitions[number].predicted_peak_bytes)
    planned = plan.partitions[number]
    size = min(planned.batch, 2 * planned.micro_batch)
    specs, buffers = workload.chain.boundaries[planned.start], BufferSizes.of_budget(device.budget_bytes)
    held = sum(size * spec.sample_bytes for spec in specs) if device.shares_host else buffers.transfer_bytes
    # Smaller than planned where an earlier process died in this check.
    asked = micro_batch = run.state.sweep_micro_batch if workload.method.sweeps else run.state.micro_batches[number]
    went_through = False
    device.set_expected_peak(planned.predicted_peak_bytes)
    device.begin_section()
    # Where it does not load, or not even the smallest micro-batch fits, another plan may do.
    with contextlib.suppress(BudgetError):
        micro_batch = _rehearse(run, number, size, micro_batch) if workload.method.sweeps else _learn_once(run, number, size)
        went_through = True
    measured = device.section_peak_bytes()
    # The check holds one batch of zeros, and reads nothing but, in a sweep, the partition's weights.
    beside = beside_bytes(workload, costs, device, buffers, planned.start, planned.batch)
    if workload.method.sweeps and device.shares_host:
        own = sum(layer.weight_bytes for layer in costs.layers[planned.start : planned.stop])
        window, least = stream_bytes(costs, plan.stream_bytes or buffers.stream_bytes), stream_bytes(costs, buffers.stream_bytes)
        beside += 2 * (window - least) - min(own, least)
    predicted = planned.predicted_peak_bytes - beside + held
    fits = went_through and micro_batch == asked
    return Check(number, predicted, measured, fits, micro_batch if went_through else None)


def _learn_once(run: Run, number: int, size: int) -> int:
    """One step of a partition on its own objective; the micro-batch with which it went through."""
    executor = Executor(run.device, run.workload.config.seed)
    stage = run.stage(number, learns=True)
    stage.loss_scale = LossScale()  # the run's is not moved by a rehearsal
    try:
        for layer in stage.residency.layers:
            layer.module.train()
        specs = run.workload.chain.boundaries[run.plan.partitions[number].start]
        inputs = tuple(torch.zeros(size, *spec.shape, dtype=spec.dtype) for spec in specs)
        batch = inputs, torch.zeros(size, *run.workload.dataset.label_shape, dtype=torch.int64)
        while True:
            try:
                _run_model(lambda: executor.train_batch(stage, batch, step=0), stage.title)
                return stage.micro_batch
            except SteppedInPart:  # by what is forgotten anyway
                pass
            executor.shrink(stage)
    finally:
        stage.residency.unload()


def _rehearse(run: Run, number: int, size: int, micro_batch: int) -> int:
    """Forward and back through a partition of a sweep; the micro-batch with which it went through.

    Raises:
        BudgetError: not even the smallest did.
    """
    sweep = next(item for item in run.workload.method.program(len(run.plan.partitions), ["train"]) if isinstance(item, Sweep))
    sweeper = Sweeper(
        run.workload, run.plan, sweep, run.device, run.weights, run.threads, run.counter, run.rundir.path, total_steps=1
    )
    while True:
        try:
            _run_model(partial(sweeper.rehearse, number, size, micro_batch), sweeper.title(number))
            return micro_batch
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Not inside the handler: the exception holds tensors.
        sweeper.close()
        run.device.release()
        if micro_batch <= run.plan.smallest_micro_batch:
            raise BudgetError(f"{sweeper.title(number)} does not fit with a micro-batch of {micro_batch}, the smallest")
        micro_batch = max(run.plan.smallest_micro_batch, micro_batch // 2)
        run.device.begin_section()


def _run_model(work: Callable[[], object], title: str) -> None:
    try:
        work()
    except LowMemError:
        raise
    except Exception as error:  # whatever a user's forward may raise; it is his to mend, not ours
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise CaptureError(
            f"the model failed on a batch of zeros in {title}: {type(error).__name__}: {reason}; mend its forward"
        ) from error

"""The measured check before training: the tightest partition does one real step on the device, and the plan is held against it."""

import contextlib
from dataclasses import dataclass

import torch

from lowmem_pnn.device import Device
from lowmem_pnn.errors import BudgetError, CaptureError, LowMemError
from lowmem_pnn.executor import Executor, Stage
from lowmem_pnn.feeds import Batch
from lowmem_pnn.planner import Plan
from lowmem_pnn.planning import reading_bytes
from lowmem_pnn.run import Run
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import IoSizes, Workload


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


def check_tightest(run: Run, workload: Workload, plan: Plan, device: Device) -> Check:
    """Run one step of the partition with the highest predicted peak, on zeros, and forget it.

    Args:
        run: at its beginning; nothing of it is changed.
        workload: what is trained.
        plan: to be checked.
        device: open.

    Raises:
        CaptureError: the model raises on real tensors.
    """
    number = max(range(len(plan.partitions)), key=lambda number: plan.partitions[number].predicted_peak_bytes)
    planned = plan.partitions[number]
    shrunk: list[int] = []
    executor = Executor(device, workload.config.seed, lambda stage: shrunk.append(stage.micro_batch))
    went_through = False
    stage: Stage | None = None
    try:
        size = min(planned.batch, 2 * planned.micro_batch)
        specs = workload.chain.boundaries[planned.start]
        batch = tuple(torch.zeros(size, *spec.shape, dtype=spec.dtype) for spec in specs), torch.zeros(size, dtype=torch.int64)
        # Where it does not load, or not even the smallest micro-batch fits, another plan may do.
        with contextlib.suppress(BudgetError):
            stage = run.stage(number, learns=True)
            for layer in stage.residency.layers:
                layer.module.train()
            _try(executor, stage, batch)
            went_through = True
        measured = device.section_peak_bytes()
    finally:
        if stage is not None:
            stage.residency.unload()
    # The check holds one batch of zeros, and reads nothing.
    held = sum(tensor.nbytes for tensor in batch[0]) if device.shares_host else 0
    reading = reading_bytes(workload, device, IoSizes.of_budget(device.budget_bytes), planned.start, planned.batch)
    predicted = planned.predicted_peak_bytes - reading + held
    micro_batch = stage.micro_batch if stage is not None and went_through else None
    return Check(number, predicted, measured, went_through and not shrunk, micro_batch)


def _try(executor: Executor, stage: Stage, batch: Batch) -> None:
    try:
        executor.train_batch(stage, batch, step=0)
    except LowMemError:
        raise
    except Exception as error:  # whatever a user's forward may raise; it is his to mend, not ours
        reason = " ".join(str(error).split())[:300]
        raise CaptureError(
            f"the model failed on a batch of zeros in {stage.title}: {type(error).__name__}: {reason}; mend its forward"
        ) from error

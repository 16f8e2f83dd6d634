"""The measured check before training: the tightest partition does one real step on the device, and the plan is held against it."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmem_pnn.device import is_out_of_memory, why_it_failed
from lowmem_pnn.engine.executor import Executor
from lowmem_pnn.engine.out_of_memory import SteppedInPart, fits, halved
from lowmem_pnn.errors import BudgetError, CaptureError, LowMemError
from lowmem_pnn.methods import Sweep
from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.partition_plan import PartitionPlan
from lowmem_pnn.planning.footprint import Footprint
from lowmem_pnn.planning.planner import partition_peak
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.profiling.costs import MemoryProfile, without_step
from lowmem_pnn.run.run import Run
from lowmem_pnn.sweep.sweeper import Sweeper
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload

_SAMPLES_READ = 2


@dataclass(frozen=True)
class Check:
    """Prediction and measurement of one partition's step, in bytes above the floor.

    Args:
        partition: number of the partition.
        predicted_bytes: prediction of the plan for what the check does, which reads no shards.
        measured_bytes: highest use of memory during the step, and during attempts with larger micro-batches that did not fit.
        fits: whether the step went through at the planned micro-batch.
        micro_batch: micro-batch with which it went through, be it after halving; None if it did not at all.
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
        """Say it in one line for people."""
        what = "went through" if self.fits else "did not fit"
        return (
            f"a step of partition {self.partition + 1} {what}: predicted {format_bytes(self.predicted_bytes)}, "
            f"measured {format_bytes(self.measured_bytes)}"
        )

    def to_dict(self) -> dict[str, int]:
        """Return what `result.json` says of the check."""
        return {
            "partition": self.partition,
            "predicted_bytes": self.predicted_bytes,
            "measured_bytes": self.measured_bytes,
            "unexplained_bytes": self.unexplained_bytes,
        }


def check_tightest(run: Run, profile: MemoryProfile, unexplained_bytes: int = 0) -> Check:
    """Run one step of the partition with the highest predicted peak, on samples of the training data or on zeros, and forget it.

    Args:
        run: a run at its beginning; nothing of it is changed.
        profile: costs of the model's layers.
        unexplained_bytes: what earlier checks have found above their plans, which this plan has room for.

    Raises:
        CaptureError: the model raises on real tensors.
    """
    workload, plan, device = run.workload, run.plan, run.session.device
    sweeps = workload.method.sweeps
    numbers = range(len(plan.partitions)) if run.state.ranks == 1 else [run.state.rank]
    if sweeps:
        # Partitions before them write their outputs once, and go back never.
        numbers = range(_full_sweep(run).first, len(plan.partitions))
    number = max(numbers, key=lambda number: plan.partitions[number].predicted_peak_bytes)
    planned = plan.partitions[number]
    samples = min(planned.batch, 2 * planned.micro_batch)
    specs = workload.chain.boundaries[planned.start]
    held = sum(samples * spec.sample_bytes for spec in specs) if device.shares_host else device.buffer_sizes.transfer_bytes
    # Smaller than planned where an earlier process died in this check.
    asked = micro_batch = run.state.sweep_micro_batch if sweeps else run.state.micro_batches[number]
    went_through = False
    by_vocabulary = plan.vocabulary_tile is not None
    request = PlanRequest(workload, profile, device, unexplained_bytes, by_vocabulary=by_vocabulary)
    predicted = _predicted(request, planned) + held
    # Freed memory that is kept for further use would be taken for memory in use.
    device.set_expected_peak(predicted)
    device.begin_section()
    # Where it does not load, or not even the smallest micro-batch fits, another plan may do.
    with contextlib.suppress(BudgetError):
        micro_batch = _sweep_once(run, number, samples, micro_batch) if sweeps else _learn_once(run, number, samples)
        went_through = True
    measured = device.section_peak_bytes()
    fits = went_through and micro_batch == asked
    return Check(number, predicted, measured, fits, micro_batch if went_through else None)


def _predicted(request: PlanRequest, planned: PartitionPlan) -> int:
    """Return the predicted peak of a partition in the check, without its batch: nothing is streamed, and in a sweep nothing steps."""
    footprint = Footprint.of(request)
    if not request.workload.method.sweeps:
        return planned.predicted_peak_bytes - footprint.beside_bytes(planned.start, planned.batch)
    costs = replace(request.costs, layers=tuple(map(without_step, request.costs.layers)))
    objective = request.objective_memory(planned.stop)
    return partition_peak(
        costs, planned.start, planned.stop, planned.micro_batch, planned.batch, objective, footprint.constant_bytes
    )


def _learn_once(run: Run, number: int, samples: int) -> int:
    """Take one step of a partition on its own objective; return the micro-batch with which it went through."""
    workload = run.workload
    executor = Executor(run.session.device, workload.config.seed)
    active = run.partitions.load(number, learns=True)
    active.loss_scale = LossScale()  # the run's is not moved by the check
    try:
        active.train()
        batch = _trial_batch(workload, run.plan.partitions[number].start, samples)
        while True:
            try:
                _run_model(lambda: executor.train_batch(active, batch, step=0), active.title)
                return active.micro_batch
            except SteppedInPart:  # by what is forgotten anyway
                pass
            executor.shrink(active)
    finally:
        active.residency.unload()


def _sweep_once(run: Run, number: int, samples: int, micro_batch: int) -> int:
    """Go forward and back through a partition of a sweep; return the micro-batch with which it went through.

    Raises:
        BudgetError: not even the smallest did.
    """
    session, workload, plan = run.session, run.workload, run.plan
    sweep = _full_sweep(run)
    sweeper = Sweeper(
        workload, plan, sweep, session.device, run.weights, session.threads, session.counter, session.rundir.path, total_steps=1
    )
    title = run.partitions.title(number)
    batch = _trial_batch(workload, plan.partitions[number].start, samples)
    while True:
        if fits(lambda size=micro_batch: _run_model(lambda: sweeper.try_partition(number, batch, size), title)):  # type: ignore[misc]
            return micro_batch
        sweeper.close()
        session.device.release()
        half = None if plan.whole_batches else halved(micro_batch, plan.smallest_micro_batch)
        if half is None:
            raise BudgetError(f"{title} does not fit with a micro-batch of {micro_batch}, the smallest")
        micro_batch = half


def _trial_batch(workload: Workload, layer: int, samples: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what the check takes for a batch: tensors of the boundary before a layer, each (samples, ...), and targets.

    Not every model takes zeros: lengths of sequences, say, are at least one. So the model's inputs are samples of the training data,
    over and over, and so are targets that a loss of the user's own takes; inside of the model whole numbers of the form of an input may
    be that input, handed on, and are taken for it. All else is zeros.
    """
    chain, train = workload.chain, workload.splits["train"]
    inputs, labels = train.batch(range(min(_SAMPLES_READ, len(train))))
    rows = torch.arange(samples) % len(labels)
    read = dict(zip(chain.boundaries[0], inputs if isinstance(inputs, tuple) else (inputs,), strict=True))
    if layer:
        read = {spec: tensor for spec, tensor in read.items() if not spec.dtype.is_floating_point}
    tensors = tuple(
        read[spec][rows] if spec in read else torch.zeros(samples, *spec.shape, dtype=spec.dtype)
        for spec in chain.boundaries[layer]
    )
    if workload.task.name == "own":
        return tensors, labels[rows]
    return tensors, workload.task.training_targets.zeros(samples)


def _full_sweep(run: Run) -> Sweep:
    sweeps = [item for item in run.workload.program(run.plan.spans, ["train"]) if isinstance(item, Sweep) and not item.frozen]
    return sweeps[0]  # the first in which all learns that ever does


def _run_model(work: Callable[[], object], title: str) -> None:
    """Do what runs a user's model, and refuse a model that raises."""
    try:
        work()
    except LowMemError:
        raise
    except Exception as error:  # whatever a user's forward may raise; it is his to mend, not ours
        if is_out_of_memory(error):
            raise
        raise CaptureError(
            f"the model failed in a step that was tried before training, in {title}: {why_it_failed(error)}"
        ) from error

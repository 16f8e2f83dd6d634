"""The life of a run, from its first plan to its result: building, the check before training, training, export, scores."""

import importlib.metadata
import json
import math
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

import lowmem_pnn
from lowmem_pnn.device import Device
from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.loaders import Loader
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import BudgetError, CheckpointError, DivergedError
from lowmem_pnn.evaluation.exits import HEADS_FILE, chosen_exit, describe_exits, head_names
from lowmem_pnn.evaluation.measure import measure, validate
from lowmem_pnn.evaluation.scores import Scores
from lowmem_pnn.methods import Sweep, share_of
from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.make_plan import SecondsOf, describe_partition, make_plan
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.report import Result
from lowmem_pnn.run.macs import program_macs, samples_learnt
from lowmem_pnn.run.ranks import Rank
from lowmem_pnn.run.run import Run
from lowmem_pnn.run.state import PartitionRecord, State
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.run_directory import RunDirectory, write_durably
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.training.initial_weights import build_weights, owners
from lowmem_pnn.training.join import TRAINED, forget
from lowmem_pnn.training.loop import train
from lowmem_pnn.training.preflight import check_tightest
from lowmem_pnn.workload import Workload

# Plans that are tried, each keeping free what the check of the one before found missing.
_MAX_PLANS = 4


def go_on(
    workload: Workload,
    costs: MemoryProfile,
    device: Device,
    rundir: RunDirectory,
    state: State,
    threads: WorkerThreads,
    display: Display,
    should_stop: Callable[[], bool],
    seconds_of: SecondsOf,
) -> Result | None:
    """From any commit to the end; None where it is another rank that joins the partitions, and has the result."""
    began = time.monotonic()
    counter = IoCounter()
    folder = rundir.path / "weights"

    def make_run(plan: Plan, weights: WeightStore) -> Run:
        return Run(workload, plan, device, rundir, weights, state, threads, counter, display, should_stop, began)

    plan = Plan.from_json(state.plan)
    if state.stage == "born":
        display.message(f"building {workload.source.spec}")
        missing = 0
        for attempt in range(_MAX_PLANS):
            run = make_run(plan, build_weights(workload, plan, folder, counter))
            check = check_tightest(run, workload, plan, costs, device)
            # What the check found beyond the plan comes on top of all that the plan foresees, reading too.
            expected = plan.predicted_peak_bytes + max(0, check.unexplained_bytes)
            if check.fits and expected <= device.budget_bytes - device.reserve_bytes // 2:
                break
            if attempt == _MAX_PLANS - 1 and check.micro_batch is not None:
                # The device has far less than the budget; smaller micro-batches get by with it.
                display.message(f"{check.describe()}; going on with a micro-batch of {check.micro_batch}")
                if workload.method.sweeps:
                    state.sweep_micro_batch = check.micro_batch
                else:
                    state.micro_batches[check.partition] = check.micro_batch
                break
            if attempt == _MAX_PLANS - 1:
                raise BudgetError(f"no plan holds: {check.describe()}; give a larger --max-gpu-mem, or a smaller --batch-size")
            # A step that did not fit does not show what it would have needed: what is kept free doubles.
            missing += max(check.unexplained_bytes, device.reserve_bytes, 0 if check.fits else missing)
            plan = make_plan(workload, costs, device, missing, seconds_of)
            display.message(f"planned again: {check.describe()}")
            state.plan = json.loads(plan.to_json())
            state.micro_batches = [part.micro_batch for part in plan.partitions]
            state.sweep_micro_batch = plan.sweep_micro_batch
            state.records = [PartitionRecord() for _ in plan.partitions]
            state.loss_scales = [LossScale.first(workload.config.precision) for _ in plan.partitions]
        state.check = check.to_dict()
        state.stage = "training"
        state.weights = run.weights.state()
        run.commit()
    else:
        run = make_run(plan, _open_committed(rundir, state, counter))
    train(run)
    if state.rank:
        state.stage = TRAINED
        run.commit()
        run.wait()
        display.message(f"partition {state.rank + 1} is trained; rank 0 joins it with the others")
        return None
    return _finish(run, workload, plan, costs, device, rundir)


def _open_committed(rundir: RunDirectory, state: State, counter: IoCounter) -> WeightStore:
    """The weights of the last commit, every byte of them and of its activations checked."""
    for name in state.activations.values():
        ActivationStore.open(rundir.path / "activations" / name, verify=True, counter=counter).close()
    older = [body["weights"] for body in rundir.older_journals() if body["weights"]]
    return WeightStore.open(rundir.path / "weights", state.weights, counter=counter, keep=older)


def _finish(run: Run, workload: Workload, plan: Plan, costs: MemoryProfile, device: Device, rundir: RunDirectory) -> Result:
    """Test, export, write the result, and only then mark the run as done."""
    weights_file = rundir.path / "model.safetensors"
    # Nothing after training needs the boundaries; without them the export fits on the disk.
    run.state.activations = {}
    run.commit()
    run.wait()
    if workload.method.partitions_are_independent and not workload.config.recovery_epochs and "val" in workload.splits:
        validate(run, "the joined model")  # no partition's own epochs could tell
    unit_accuracies: list[float | None] = []
    scores = score(run, workload, unit_accuracies) if "test" in workload.splits else {}
    if not all(math.isfinite(score) for score in scores.values()):
        raise DivergedError(f"the trained model's test loss is {scores['test_loss']}; try a lower --lr")
    run.weights.export(weights_file, workload.chain.persistent, owners(workload.chain))
    exits: list[dict[str, Any]] = []
    if workload.method.learns_per_layer:
        exits = describe_exits(run, unit_accuracies or [None] * len(workload.chain.layers))
        run.weights.export(rundir.path / HEADS_FILE, head_names(workload.chain))
    run.update_totals()
    state = run.state
    result = _make_result(workload, plan, costs, device, state, scores, exits, rundir.path)
    write_durably(rundir.path / "result.json", result.to_json() + "\n")
    state.stage = "done"
    run.commit()
    run.wait()
    clear(rundir)
    forget(rundir, state.ranks)
    return result


def clear(rundir: RunDirectory) -> None:
    """Delete the working files of a run that is done, and the older commits, which need them."""
    for name in ("weights", "activations"):
        shutil.rmtree(rundir.path / name, ignore_errors=True)
    for older in rundir.path.glob("journal.*.json"):
        older.unlink(missing_ok=True)


def score(run: Run, workload: Workload, unit_accuracies: list[float | None] | None = None) -> dict[str, float]:
    """Loss and other scores on the test data.

    Args:
        run: trained.
        workload: what was trained.
        unit_accuracies: gets the accuracy of every layer's own scores, where there are such; None if nobody asks.
    """
    tokens = bool(workload.dataset.label_shape)
    total = Scores(tokens)

    def of_one(outputs: tuple[Tensor, ...], labels: Tensor) -> Scores:
        scores = Scores(tokens)
        scores.add(outputs, labels)
        return scores

    def of_units(stage: ActivePartition, loader: Loader) -> None:
        if unit_accuracies is not None and stage.objective.per_layer_loss:
            unit_accuracies.extend(tally.accuracy for tally in run.executor.measure(stage, loader))

    measure(run, "test", of_one, total.merge, on_partition=of_units)
    return total.result()


def _make_result(
    workload: Workload,
    plan: Plan,
    costs: MemoryProfile,
    device: Device,
    state: State,
    scores: dict[str, float],
    exits: list[dict[str, Any]],
    path: Path,
) -> Result:
    config, last = workload.config, state.records[-1]
    program, samples = workload.method.program(len(plan.partitions), workload.training_splits), len(workload.splits["train"])
    epochs = [config.value_for("epochs", number) for number in range(len(plan.partitions))]
    partitions = []
    for number, (part, record) in enumerate(zip(plan.partitions, state.records, strict=True)):
        partitions.append(
            {
                **describe_partition(workload, part),
                "micro_batch": state.sweep_micro_batch if workload.method.sweeps else state.micro_batches[number],
                "epochs": epochs[number],
                "peak_bytes": record.peak_bytes,
                "seconds": record.seconds,
                "waited": record.waited,
            }
        )
    return Result(
        method=config.method,
        model=config.model,
        data=config.data,
        seed=config.seed,
        precision=config.precision,
        device=device.describe(),
        budget_bytes=device.budget_bytes,
        budget_scope=config.budget_scope,
        floor_bytes=device.floor_bytes,
        peak_bytes=max(state.peak_bytes, *(record.peak_bytes for record in state.records)),  # of any rank
        host_peak_bytes=state.host_peak_bytes,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        reserve_bytes=device.reserve_bytes,
        check=state.check,
        training_state_bytes=costs.training_state_bytes,
        partitions=partitions,
        epochs=epochs,
        seconds=state.seconds,
        compiled=workload.compiled,
        samples_per_second=samples_learnt(program, samples) / max(state.seconds, 1e-9),
        train_loss=last.train_loss,
        val_loss=last.val_loss,
        val_accuracy=last.val_accuracy,
        test_loss=scores.get("test_loss"),
        test_accuracy=scores.get("test_accuracy"),
        test_f1=scores.get("test_f1"),
        perplexity=scores.get("perplexity"),
        macs=program_macs(program, plan, samples),
        exits=exits,
        chosen_exit=chosen_exit(exits, config.exit_tolerance),
        bytes_read=state.bytes_read,
        bytes_written=state.bytes_written,
        oom_retries=state.oom_retries,
        skipped_steps=sum(scale.skipped for scale in state.loss_scales),
        resumed=state.resumed,
        workdir=str(path),
        weights_file=str(path / "model.safetensors"),
        preprocessing=workload.dataset.preprocessing,
        versions={
            "lowmem-pnn": lowmem_pnn.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "torchvision", "safetensors", "numpy")},
        },
    )


def first_state(workload: Workload, plan: Plan, rank: Rank) -> State:
    return State(
        plan=json.loads(plan.to_json()),
        micro_batches=[part.micro_batch for part in plan.partitions],
        sweep_micro_batch=plan.sweep_micro_batch,
        loss_scales=[LossScale.first(workload.config.precision) for _ in plan.partitions],
        records=[PartitionRecord() for _ in plan.partitions],
        data=workload.dataset.fingerprint,
        rank=rank.number,
        ranks=rank.of,
    )


def check_same_data(state: State, workload: Workload, path: Path) -> None:
    if state.data != workload.dataset.fingerprint:
        raise CheckpointError(
            f"the data {workload.config.data} is not what the run in {path} began with; bring it back, or begin a new run"
        )


def check_same_rank(state: State, rank: Rank, path: Path) -> None:
    if (state.rank, state.ranks) != (rank.number, rank.of):
        raise CheckpointError(
            f"the run in {path} is process {state.rank + 1} of {state.ranks}, and this is {rank.number + 1} of {rank.of}; resume it "
            + (f"by torchrun with {state.ranks} processes" if state.ranks > 1 else "without torchrun")
        )


def halve(state: State, workload: Workload) -> None:
    """Halve the micro-batch of the partition that was resident when the process died.

    Raises:
        BudgetError: it is the smallest already.
    """
    program = share_of(workload.method.program(len(state.micro_batches), workload.training_splits), state.rank, state.ranks)
    smallest = state.plan["smallest_micro_batch"]
    everywhere = list(range(len(state.micro_batches)))
    item = program[state.visit] if state.visit < len(program) else None
    if state.stage == "born":
        peaks = [part["predicted_peak_bytes"] for part in state.plan["partitions"]]
        numbers = [peaks.index(max(peaks))]  # the one that is checked
    elif item is None or isinstance(item, Sweep):
        numbers = everywhere  # any of them: while the model was measured
    else:
        numbers = [item.partition]
    sweeping = workload.method.sweeps or isinstance(item, Sweep)
    sizes = [*(state.micro_batches[number] for number in numbers), *([state.sweep_micro_batch] if sweeping else [])]
    if all(size <= smallest for size in sizes):
        raise BudgetError(
            f"partition {numbers[0] + 1} died at the memory limit with a micro-batch of {smallest}, the smallest; "
            "give a larger --max-gpu-mem"
        )
    for number in numbers:
        state.micro_batches[number] = max(smallest, state.micro_batches[number] // 2)
    if sweeping:
        state.sweep_micro_batch = max(smallest, state.sweep_micro_batch // 2)
    state.oom_retries += 1

"""The life of a run, from its first commit to its result: building, the check before training, training, test, export."""

import dataclasses
import gc
import hashlib
import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lowmem_pnn.adapters.adapter_folder import write_adapter
from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.loaders import Loader
from lowmem_pnn.errors import BudgetError, CheckpointError, ConfigError, DataError, Stopped
from lowmem_pnn.evaluation.exits import HEADS_FILE, describe_exits, head_names
from lowmem_pnn.evaluation.measure import measure, validate
from lowmem_pnn.evaluation.text_samples import say_samples
from lowmem_pnn.exporting.transformers_folder import write_folder
from lowmem_pnn.methods import SplitName
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.disk_footprint import free_disk_bytes
from lowmem_pnn.planning.make_plan import SecondsOf, make_plan
from lowmem_pnn.planning.notes import plan_notes
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.metrics_table import write_metrics_table
from lowmem_pnn.run.run import Run
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.state import STORE_NAME, State, states_of, weights_of
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.disk import RUN_REMEDY, remove_folder, sync_folder, write_durably
from lowmem_pnn.stores.keys import VERSIONS_KEY, CommittedFile
from lowmem_pnn.stores.run_creation import TRANSFORMERS_FOLDER
from lowmem_pnn.stores.run_directory import way_back
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.tasks import Scores
from lowmem_pnn.training.header import describe_start
from lowmem_pnn.training.initial_weights import build_weights, check_layouts
from lowmem_pnn.training.join import forget
from lowmem_pnn.training.meta_run import check_meta_model
from lowmem_pnn.training.mixing import find_mixing
from lowmem_pnn.training.parity import compare
from lowmem_pnn.training.preflight import Check, check_tightest
from lowmem_pnn.training.program import carry_out
from lowmem_pnn.training.result import make_result
from lowmem_pnn.training.token_checks import are_to_be_checked, check_tokens
from lowmem_pnn.workload import Workload

_MEASURED = {"val": "validated", "test": "tested"}

# Plans that are tried, each keeping free what the check of the one before found missing.
_MAX_PLANS = 4


def run_to_end(
    session: Session, workload: Workload, profile: MemoryProfile, state: State, seconds_of: SecondsOf
) -> Result | None:
    """Bring a run from any commit to its end.

    Args:
        session: the process's side of the run.
        workload: model, data and method.
        profile: costs of the model's layers.
        state: state of the last commit.
        seconds_of: predicts the seconds of a plan, where a plan is to be made again.

    Returns:
        What `result.json` says; None where another process joins the partitions, and has the result.
    """
    if state.stage == "born":
        run = _begin(session, workload, profile, state, seconds_of)
    else:
        run = Run(session, workload, Plan.from_json(state.plan), _open_committed(session, workload, state), state)
    session.display.header(describe_start(run, profile))
    if not sync_folder(session.rundir.path):
        session.display.message(
            f"the file system of {session.rundir.path} cannot sync folders: after a loss of power the last commits may not be found there"
        )
    session.callbacks.tell("on_fit_start", _told_at_start(run))
    if not state.said_before:
        state.said_before = say_samples(run, "before training")
    try:
        carry_out(run, run_to_end)
    except Stopped:
        write_metrics_table(session)
        raise
    if state.rank:
        write_metrics_table(session)
        run.end("trained")
        session.display.message(f"partition {state.rank + 1} is trained; rank 0 joins it with the others")
        return None
    return _finish(run, profile)


def _begin(session: Session, workload: Workload, profile: MemoryProfile, state: State, seconds_of: SecondsOf) -> Run:
    """Build the initial weights for a plan that has been checked on the device, and commit them."""
    device, display = session.device, session.display
    plan = Plan.from_json(state.plan)
    missing = 0
    compared: Literal["yes", "no"] = "no"
    mixing: dict[str, int] = {}

    def request(unexplained_bytes: int = 0) -> PlanRequest:
        # What the run has written so far is its own.
        free = free_disk_bytes(session.rundir.path)
        free = None if free is None else free + session.rundir.disk_bytes()
        return PlanRequest(workload, profile, device, unexplained_bytes, mixes_samples=bool(mixing), free_disk_bytes=free)

    checks_tokens = are_to_be_checked(workload)

    def inspect_once(model: nn.Module) -> None:
        nonlocal compared, mixing
        if workload.config.compare:
            display.stage("comparing the model with its layers")
            with session.rundir.scratch() as folder:  # by its name what a kill leaves of it is known
                compared = compare(workload, model, folder, display.message)
            # Copies of modules refer to each other in cycles, and to gradients; and the heap is full of holes.
            gc.collect()
            device.release()
            mixing = find_mixing(workload, model, display.message)
        if checks_tokens:
            check_tokens(workload, model, display.message)
        if mixed := [name for name, layer in mixing.items() if layer < workload.fixed_layers]:
            raise ConfigError(
                f"{mixed[0]} mixes the samples of a batch, and is in frozen layers whose outputs are to be written once for every sample; "
                "give --no-cache-frozen"
            )

    for attempt in range(_MAX_PLANS):
        display.stage(f"building {workload.source.spec}")
        inspect = inspect_once if (workload.config.compare or checks_tokens) and not attempt else None
        weights = build_weights(
            workload, plan, session.rundir.path / "weights", session.counter, inspect=inspect, metered=device.metered
        )
        run = Run(session, workload, plan, weights, state)
        if mixing and not attempt and (mixed := _plan_with_mixing(request(), seconds_of, next(iter(mixing)))) != plan:
            plan = mixed
            display.message(f"planned again: {next(iter(mixing))} mixes the samples of a batch, and is to see many")
            run.replan(plan)
            continue
        display.stage("checking one step")
        # What building and comparing the model has left is no part of the step.
        gc.collect()
        device.release()
        check = check_tightest(run, profile, missing)
        # What the check found beyond the plan, which knows of what earlier ones found, comes on top of all that it foresees, reading too.
        found = check.unexplained_bytes
        expected = plan.predicted_peak_bytes + plan.waiting_bytes + max(0, found)
        if check.fits and expected <= device.budget_bytes - device.reserve_bytes // 2:
            break
        # A step that did not fit does not show what it would have needed: what is kept free doubles.
        missing += max(found, device.reserve_bytes, 0 if check.fits else missing)
        if (another := _plan_anew(request(missing), seconds_of, check, is_last=attempt == _MAX_PLANS - 1)) is None:
            assert check.micro_batch is not None, "a step went through"
            display.message(f"{check.describe()}; going on with a micro-batch of {check.micro_batch}")
            run.set_micro_batch(None if workload.method.sweeps else check.partition, check.micro_batch)
            break
        plan = another
        display.message(f"planned again: {check.describe()}")
        run.replan(plan)
    for note in plan_notes(request(), run.plan, mixing):
        display.message(note)
    state.mixing = mixing
    run.begin_training(check.to_dict(), compared)
    return run


def _plan_anew(request: PlanRequest, seconds_of: SecondsOf, check: Check, *, is_last: bool) -> Plan | None:
    """Return a plan with more room for what a check found; None where there is none, and the micro-batch that went through is to do.

    Raises:
        BudgetError: no step went through, or what did not go through cannot be divided.
    """
    if is_last:
        if check.micro_batch is None:
            raise BudgetError(f"no plan holds: {check.describe()}; give a larger --max-gpu-mem, or a smaller --batch-size")
        return None  # the device has far less than the budget; smaller micro-batches get by with it
    try:
        return make_plan(request, seconds_of)
    except BudgetError:
        if check.micro_batch is None or request.whole_batches:
            raise
        return None


def _plan_with_mixing(request: PlanRequest, seconds_of: SecondsOf, module: str) -> Plan:
    """Plan anew for a model of which it was found out that a module mixes the samples of a batch."""
    try:
        return make_plan(request, seconds_of)
    except BudgetError as error:
        raise BudgetError(
            f"{module} mixes the samples of a batch, which is to go through at once (--batch-norm refuse): {error}",
            error.enough_bytes,
        ) from None


def _open_committed(session: Session, workload: Workload, state: State) -> WeightStore:
    """Open the weights of the last commit, every byte of them and of its activations checked; drop what no commit names."""
    rundir, counter, plan = session.rundir, session.counter, Plan.from_json(state.plan)
    older = states_of(rundir.older_journals())
    if state.meta:
        check_meta_model(rundir.path)
    folder = rundir.path / "activations"
    try:
        for name in state.activations.values():
            with closing(ActivationStore.open(folder / name, verify=True, counter=counter)) as stored:
                check_boundary(stored, folder / name, workload, plan)
        weights = WeightStore.open(
            rundir.path / "weights", state.weights, counter=counter, keep=[*weights_of(older), *weights_of([state])[1:]]
        )
        check_layouts(weights, workload, plan)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{way_back(rundir.path)}") from None
    named = {name for one in (state, *older) for name in one.activations.values()}
    for left in folder.iterdir() if folder.is_dir() else ():
        if left.name not in named and STORE_NAME.fullmatch(left.name):
            remove_folder(left)
    return weights


def _finish(run: Run, profile: MemoryProfile) -> Result:
    """Test, export, write the result, and only then mark the run as done."""
    workload, rundir = run.workload, run.session.rundir
    run.session.display.stage("measuring and writing the trained model")
    # Without the stores of boundaries the export fits on the disk.
    run.forget_stores()
    run.commits.commit()
    run.commits.wait()
    is_joined = workload.method.partitions_are_independent or workload.method.incubates
    if is_joined and not workload.config.recovery_epochs and "val" in workload.splits:
        validate(run, "the joined model")  # no partition's own epochs could tell
    run.take_best()
    # Before anything is tested: what has been trained is not lost to data that cannot be read.
    chain = workload.chain
    versions = {VERSIONS_KEY: chain.versions} if chain.versions else {}
    if versions:
        run.session.display.message(
            "the model asks for the versions of its modules: load its weights by lowmem_pnn.load_weights()"
        )
    left = [run.weights.export(rundir.path / "model.safetensors", chain.persistent, chain.owners, versions)]
    if workload.method.learns_per_layer:
        left.append(run.weights.export(rundir.path / HEADS_FILE, head_names(chain)))
    adapter = None
    if workload.config.lora is not None:
        adapter = write_adapter(rundir.path, chain, workload.config, run.weights, workload.source)
    layer_accuracies: list[float | None] = []
    scores = _scores(run, layer_accuracies)
    exits: list[dict[str, Any]] = []
    if workload.method.learns_per_layer:
        exits = describe_exits(run, layer_accuracies or [None] * len(chain.layers))
    run.metrics.update_totals()
    said = say_samples(run, "after training")
    result = make_result(run, profile, scores, exits, adapter, said)
    text = (result.to_json() + "\n").encode()
    write_durably(rundir.path / "result.json", text)
    left.append(CommittedFile("result.json", hashlib.sha256(text).hexdigest(), len(text)))
    if result.transformers_folder is not None:
        folder, weights_file = rundir.path / TRANSFORMERS_FOLDER, rundir.path / "model.safetensors"
        write_folder(folder, weights_file, workload.source, workload.config, result, workload.dataset, links=True)
    write_metrics_table(run.session)
    run.end("done", {file.file: file for file in left})
    rundir.clear()
    forget(rundir, run.state)
    run.session.callbacks.tell("on_fit_end", dataclasses.asdict(result))
    return result


def _told_at_start(run: Run) -> dict[str, Any]:
    config, state = run.workload.config, run.state
    return {
        "workdir": str(run.session.rundir.path),
        "method": config.method,
        "model": config.model,
        "data": config.data,
        "partitions": len(run.plan.partitions),
        "resumed": state.resumed,
        "epochs_done": run.epochs_before + state.progress.epoch,
    }


def _scores(run: Run, layer_accuracies: list[float | None]) -> dict[str, dict[str, Any]]:
    """Measure the trained model on validation and test data; what cannot be measured is said, and left out."""
    display = run.session.display
    found: dict[str, dict[str, Any]] = {}
    for split in ("val", "test"):
        if split not in run.workload.splits:
            continue
        try:
            measured = score(run, split, layer_accuracies if split == "test" else None)
        except DataError as error:
            layer_accuracies.clear()
            display.message(f"the trained weights are written, but cannot be {_MEASURED[split]}: {error}")
            continue
        found[split] = finite_scores(measured, split, display)
    return found


def finite_scores(measured: Mapping[str, Any], split: SplitName, display: Display) -> dict[str, Any]:
    """Return scores but for those that are no numbers, of which it is said that they are left out.

    Args:
        measured: scores by name.
        split: part of the data.
        display: is told.
    """
    found = {}
    for name, value in measured.items():
        if isinstance(value, float) and not math.isfinite(value):
            display.message(f"{split} {name.replace('_', ' ')} is {value}, and left out of the result")
        else:
            found[name] = value
    return found


def check_boundary(store: ActivationStore, folder: Path, workload: Workload, plan: Plan) -> None:
    """Refuse activations that are not of the boundary that their store's name says.

    Args:
        store: open store.
        folder: folder of the store.
        workload: model, data and method.
        plan: partitions of the model.

    Raises:
        CheckpointError: they are of another boundary, or of another model.
    """
    number = int(folder.name[1:].partition("-")[0]) - 1  # of the partition that has written it
    specs = workload.chain.boundaries[plan.partitions[number].stop] if 0 <= number < len(plan.partitions) - 1 else None
    if specs is None or (tuple(store.specs), store.labels) != (tuple(specs), workload.dataset.targets.spec):
        raise CheckpointError(f"{str(folder)!r} holds no samples of a boundary of this model; {RUN_REMEDY}")


def score(run: Run, split: SplitName = "test", layer_accuracies: list[float | None] | None = None) -> dict[str, Any]:
    """Measure loss and other scores on part of the data.

    Args:
        run: a trained run.
        split: part of the data.
        layer_accuracies: gets the accuracy of every layer's own outputs, where there are such; None if nobody asks.

    Raises:
        DataError: nothing in it counts, or it cannot be read.
    """
    task = run.workload.task
    total = task.scores()

    def scores_of(outputs: tuple[Tensor, ...], labels: Tensor) -> Scores:
        scores = task.scores()
        scores.add(outputs, labels)
        return scores

    def measure_layers(active: ActivePartition, loader: Loader) -> None:
        if layer_accuracies is not None and active.objective.per_layer_loss:
            layer_accuracies.extend(tally.accuracy for tally in run.partitions.executor.measure(active, loader))

    measure(run, split, scores_of, total.merge, on_partition=measure_layers)
    found = total.result()
    if not found:
        raise DataError(f"no label of the {split} part counts, so there is nothing to measure; give data with labels that count")
    return found

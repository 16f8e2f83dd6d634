"""What a resume begins with: the state of the last commit, if it belongs to what is asked now."""

import dataclasses
from pathlib import Path

from lowmem_pnn.config.checks import check_lengths, contradictions
from lowmem_pnn.config.configure import unmet
from lowmem_pnn.config.faults import flag
from lowmem_pnn.config.fit_config import FitConfig, default_of, field_names
from lowmem_pnn.config.resume import raised
from lowmem_pnn.engine.out_of_memory import halved
from lowmem_pnn.engine.tally import EpochProgress
from lowmem_pnn.errors import BudgetError, CheckpointError, ConfigError
from lowmem_pnn.methods import Sweep, Visit, visits_of_rank
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.run.ranks import Rank
from lowmem_pnn.run.state import State
from lowmem_pnn.stores.disk import RUN_REMEDY
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.tasks import OwnMetrics
from lowmem_pnn.workload import Workload
from lowmem_pnn.zoo.model_source import ModelSource

_LARGEST = 2**63 - 1
# Data in so many files that their bytes are not read.
_COMPARED_BY_TIMES = ("imagefolder:", "segmentation:")
# Options that a run has otherwise than by default only where its method reads them.
_OF_METHODS = ("views", "plan_for", "recompute", "loss_chunk", "recovery_epochs")


def stored_config(rundir: RunDirectory) -> FitConfig:
    """Return the options that a run began with, and the epochs that a resume has raised them to.

    Args:
        rundir: directory of the run.

    Raises:
        CheckpointError: they are damaged, or no run has such options.
    """
    config = FitConfig.from_json(rundir.config_json())
    given = [name for name in _OF_METHODS if getattr(config, name) != default_of(name)]
    faults = [f"{flag(name)} has no effect here: it needs {need}" for name, need in unmet(config, given)] + contradictions(config)
    for name in field_names():
        value = getattr(config, name)
        if any(isinstance(one, int) and abs(one) > _LARGEST for one in (value if isinstance(value, tuple) else (value,))):
            faults.append(f"{flag(name)} is beyond 64 bits")
    if faults:
        raise CheckpointError(f"{rundir.path / 'config.json'} is of no run: {faults[0]}; {RUN_REMEDY}")
    return raised(config, rundir.journal())


def with_the_visits_it_began_with(config: FitConfig, rundir: RunDirectory) -> FitConfig:
    """Return the options of a run that may train longer, with which it goes through visits as it began to.

    What frozen layers give is written once for several epochs; a run that began with a single one computes it in each.

    Args:
        config: options with the epochs that it is to have.
        rundir: directory of the run.
    """
    began = FitConfig.from_json(rundir.config_json())
    if began.method == "exact" and began.epochs[0] == 1 < config.epochs[0]:
        return dataclasses.replace(config, cache_frozen=False)
    return config


def go_on_from_the_end(state: State, before: FitConfig, workload: Workload, path: Path) -> None:
    """Make a finished run one that is at the end of its last epoch, with more to come.

    Args:
        state: state of the run, which is changed.
        before: options with the epochs that it has.
        workload: model, data and method, with the epochs that it is to have.
        path: folder of the run, for the message.

    Raises:
        ConfigError: its optimizer's state is gone, or it ended before its last epoch.
    """
    if state.stopped_step:
        raise ConfigError(f"the run in {path} ended early, after step {state.stopped_step}: it has no last epoch to go on from")
    if not before.keep_state or not (path / "weights").is_dir():
        raise ConfigError(
            f"the run in {path} is done, and its optimizer's state went with its end; begin with --keep-state to train further, or "
            f"begin a new run with --weights {path}"
        )
    program = workload.program(Plan.from_json(state.plan).spans)
    first = last = len(program) - 1
    done = before.epochs[0] - sum(item.epochs_learnt for item in program[:last])
    # What frozen layers gave has gone with the end of the run, and is written again.
    while first and isinstance(before_it := program[first - 1], Visit) and before_it.action == "emit":
        first -= 1
    state.stage, state.files, state.visit = "training", {}, first
    state.progress, state.epochs_behind = (EpochProgress(epoch=done), 0) if first == last else (EpochProgress(), done)


def resumed_state(rundir: RunDirectory, workload: Workload, rank: Rank) -> State:
    """Return the state of a run's last commit.

    Args:
        rundir: directory of the run.
        workload: model, data and method, opened as the run's configuration says.
        rank: which of several processes this is.

    Raises:
        CheckpointError: the data is not what the run began with, or it was begun by another process of several.
    """
    state = State.from_journal(rundir.journal(), rundir.path)
    check_same_rank(state, rank, rundir.path)
    check_same_data(state, workload, rundir.path)
    check_plan(state, workload, rundir.path)
    check_position(state, workload, rundir.path)
    return state


def check_metrics(state: State, metrics: OwnMetrics, path: Path) -> None:
    """Refuse metrics of the user's own where a run's plan has the model's outputs in pieces.

    Args:
        state: state of the run.
        metrics: the metrics, by name.
        path: folder of the run, for the message.

    Raises:
        ConfigError: there are such.
    """
    rows = state.plan["loss_chunk"]
    if rows is not None and metrics:
        raise ConfigError(
            f"metrics of your own take whole outputs, and the run's plan has {rows} rows at a time; take them of what "
            f"lowmem_pnn.predict({str(path)!r}) returns"
        )


def check_plan(state: State, workload: Workload, path: Path) -> None:
    """Refuse a plan that is not of a run's model, or that has not as many partitions as its options have values.

    Args:
        state: state of the run.
        workload: model, data and method.
        path: folder of the run, for the message.

    Raises:
        CheckpointError: it is another model's.
    """
    parts, layers = state.plan["partitions"], len(workload.chain.layers)
    if (planned := parts[-1]["stop"]) != layers:
        raise _not_ours(path, f"a plan of {planned} layers, where the model has {layers}")
    try:
        check_lengths(workload.config, len(parts))
    except ConfigError as error:
        raise _not_ours(path, f"{len(parts)} partitions, where {error}") from None


def check_position(state: State, workload: Workload, path: Path) -> None:
    """Refuse a position that is not in a run's program.

    Args:
        state: state of the run.
        workload: model, data and method.
        path: folder of the run, for the message.

    Raises:
        CheckpointError: there is no such position.
    """
    parts, progress = state.plan["partitions"], state.progress
    program = visits_of_rank(workload.program(Plan.from_json(state.plan).spans), state.rank, state.ranks)
    if state.visit > len(program):
        raise _not_ours(path, f"visit {state.visit}, where the program has {len(program)}")
    if state.visit == len(program):
        return
    item = program[state.visit]
    batch = item.batch_size if isinstance(item, Sweep) else parts[item.partition]["batch"]
    batches = -(-len(workload.splits["train"]) // batch)
    if progress.epoch > max(1, item.epochs) or progress.batch > batches:
        raise _not_ours(
            path,
            f"epoch {progress.epoch}, batch {progress.batch}, where visit {state.visit} has {item.epochs} epochs of {batches}",
        )
    if isinstance(item, Sweep) and state.sweep_micro_batch < 1:
        raise _not_ours(path, f"a micro-batch of {state.sweep_micro_batch} in a sweep")


def _not_ours(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"the journal of {path} is not a valid journal of this run ({fault}); {RUN_REMEDY}")


def check_same_rank(state: State, rank: Rank, path: Path) -> None:
    """Refuse a run that another process of several began.

    Args:
        state: state of the run.
        rank: which of several processes this is.
        path: folder of the run, for the message.

    Raises:
        CheckpointError: it was another one.
    """
    if (state.rank, state.ranks) != (rank.number, rank.size):
        raise CheckpointError(
            f"the run in {path} is process {state.rank + 1} of {state.ranks}, and this is {rank.number + 1} of {rank.size}; resume it "
            + (f"by torchrun with {state.ranks} processes" if state.ranks > 1 else "without torchrun")
        )


def check_same_data(state: State, workload: Workload, path: Path) -> None:
    """Refuse data that is not what a run began with.

    Args:
        state: state of the run.
        workload: data that was opened now.
        path: folder of the run, for the message.

    Raises:
        CheckpointError: it is other data.
    """
    # Runs of earlier versions hold no numbers of samples.
    then, _, sizes = state.data.partition(" ")
    now, _, sizes_now = workload.data_stamp.partition(" ")
    if then != now:
        change = f"samples then {sizes}, now {sizes_now}" if sizes != sizes_now else f"as many samples, {sizes}, but others"
        if workload.config.data.startswith(_COMPARED_BY_TIMES) and sizes == sizes_now:
            change += ", or copies with other times of change: copy them with their times, as cp -a does"
        raise CheckpointError(
            f"the data {workload.config.data} is not what the run in {path} began with{f' ({change})' if sizes else ''}; bring it back, "
            "or begin a new run"
        )


def check_same_weights(state: State, source: ModelSource, path: Path) -> None:
    """Refuse pretrained weights that are not what a run began with; where they are gone, the run has all that it needs of them.

    Args:
        state: state of the run.
        source: model, with the pretrained weights that are named now.
        path: folder of the run, for the message.

    Raises:
        CheckpointError: they are others.
    """
    began = state.pretrained.get("sha256")
    if source.weights is not None and began and source.weights.are_there() and source.weights.sha256() != began:
        raise CheckpointError(
            f"the weights {source.weights.where} are not what the run in {path} began with; bring them back, or begin a new run"
        )


def count_resume(rundir: RunDirectory, state: State, workload: Workload, *, after_crash: bool) -> None:
    """Bring a run's files back to its last commit, and its state to what the process goes on with.

    Args:
        rundir: directory of the run.
        state: state of the last commit, which is changed.
        workload: model, data and method.
        after_crash: whether the last process died at the memory limit: the micro-batch that was in use is then halved.

    Raises:
        BudgetError: the micro-batch is the smallest already.
    """
    rundir.cut_metrics(state.metrics_bytes)
    state.resumed += 1
    if after_crash:
        _halve_micro_batches(state, workload)
        state.number += 1
        rundir.commit(state.to_journal(), workload.config.keep_commits)  # or the next crash would halve it no further


def _halve_micro_batches(state: State, workload: Workload) -> None:
    """Halve the micro-batch of the partition that was resident when the process died, or of all that may have been."""
    program = visits_of_rank(workload.program(Plan.from_json(state.plan).spans), state.rank, state.ranks)
    smallest = max(state.micro_batches) if state.plan.get("whole_batches") else state.plan["smallest_micro_batch"]
    item = program[state.visit] if state.visit < len(program) else None
    if state.stage != "born" and not isinstance(item, Sweep | None) and item.action == "meta":
        return  # the meta model's own run has its micro-batch
    if state.stage == "born":
        peaks = [part["predicted_peak_bytes"] for part in state.plan["partitions"]]
        numbers = [peaks.index(max(peaks))]  # the one that is checked
    elif item is None or isinstance(item, Sweep):
        numbers = list(range(len(state.micro_batches)))  # any of them: while the model was measured
    else:
        numbers = [item.partition]
    halves = {number: halved(state.micro_batches[number], smallest) for number in numbers}
    # Visits of a method that sweeps write what frozen layers give, and go by their own.
    is_sweeping = isinstance(item, Sweep) or (workload.method.sweeps and (item is None or state.stage == "born"))
    sweep_half = halved(state.sweep_micro_batch, smallest) if is_sweeping else None
    if sweep_half is None and not any(halves.values()):
        raise BudgetError(
            f"partition {numbers[0] + 1} died at the memory limit with a micro-batch of {smallest}, the smallest; "
            "begin a new run with a larger --max-gpu-mem"
        )
    for number, half in halves.items():
        state.micro_batches[number] = half or state.micro_batches[number]
    state.sweep_micro_batch = sweep_half or state.sweep_micro_batch
    state.oom_retries += 1

"""The public functions: `fit`, `plan`, `evaluate`, and what the command line calls for them."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.options import check_same_options, configure, next_workdir
from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import BudgetError, CheckpointError, ConfigError, LowMemError
from lowmem_pnn.model.compiler import check_compiler
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.comparison import compare
from lowmem_pnn.planning.footprint import check_disk
from lowmem_pnn.planning.make_plan import describe_plan, make_plan
from lowmem_pnn.planning.time_estimate import TimeEstimator
from lowmem_pnn.profiling.benchmark import LayerBenchmark
from lowmem_pnn.profiling.profiler import Known
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.report import PlanReport, Result
from lowmem_pnn.run.ranks import ALONE, Rank
from lowmem_pnn.run.run import Run
from lowmem_pnn.run.state import State
from lowmem_pnn.stores.disk import IoCounter, allow_many_files
from lowmem_pnn.stores.run_directory import RunDirectory, read_journal
from lowmem_pnn.training.export import export_exit, find_exit
from lowmem_pnn.training.initial_weights import build_weights
from lowmem_pnn.training.inputs import Inputs, Model, name_of, named_inputs, python_inputs
from lowmem_pnn.training.join import TRAINED
from lowmem_pnn.training.lifecycle import check_same_data, check_same_rank, clear, first_state, go_on, halve, score
from lowmem_pnn.training.setup import open_workload, rehearse
from lowmem_pnn.workload import make_workload, profile_workload


def fit(
    model: Model,
    train: Any,
    val: Any = None,
    *,
    max_gpu_mem: str | int,
    test: Any = None,
    workdir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    **options: Any,
) -> Result:
    """Train a model within a memory budget, as the command `lowmem-pnn fit` does.

    Args:
        model: a name as the command takes it, a function that builds the model, or a model. Of a model that does not fit in memory
            only a function (or a name) can train: it is then never built whole in memory.
        train: a data set's name as the command takes it, a map-style torch data set of (x, y), or a tuple of tensors (x, y): x
            (N, ...) float32, y (N,) int64.
        val: a data set or tensors to validate on; None takes `val_fraction` of `train`.
        max_gpu_mem: the budget, as a size ("2GB") or in bytes.
        test: a data set or tensors to test on after training.
        workdir: the run's folder; None takes the next free one under `runs`.
        resume: go on with the run in `workdir`; model and data must be given as before.
        overwrite: replace the run in `workdir`.
        display: is told of the run's progress; None shows nothing.
        **options: other fields of `FitConfig`.

    On Linux glibc's thresholds for giving memory back stay lowered in the process; the memory limit is lifted at the end.

    Returns:
        What `result.json` says. The trained weights are in `result.weights_file`.

    Raises:
        LowMemError: a subclass that says what was wrong; `exit_code` is the command's.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = fit("mlp:64-32-10", "digits", max_gpu_mem="100MB", epochs=1, workdir=f"{folder}/run", device="cpu")
        >>> result.peak_bytes < 100_000_000
        True
    """
    names = {"model": name_of(model), "data": train if isinstance(train, str) else f"python:{type(train).__name__}"}
    config = configure(max_gpu_mem=max_gpu_mem, **names, **options)
    path = Path(workdir) if workdir is not None else next_workdir(config)
    sources = python_inputs(config, model, train, val, test)
    result = _train(config, path, sources, resume=resume, overwrite=overwrite, display=display or Display())
    assert result is not None, "one process trains all partitions"
    return result


def plan(model: Model, train: Any, val: Any = None, *, max_gpu_mem: str | int, timing: bool = True, **options: Any) -> PlanReport:
    """Show what `fit` with the same arguments would do; nothing is trained or kept.

    Args:
        model: as for `fit`.
        train: as for `fit`.
        val: as for `fit`.
        max_gpu_mem: as for `fit`.
        timing: run layers for a few seconds, within the budget, to say what an epoch of every method takes.
        **options: as for `fit`.

    Returns:
        The partitions, and whether they fit; with `timing` all methods side by side.
    """
    names = {"model": name_of(model), "data": train if isinstance(train, str) else f"python:{type(train).__name__}"}
    config = configure(max_gpu_mem=max_gpu_mem, **names, **options)
    return _plan(config, python_inputs(config, model, train, val, None), timing)


def evaluate(run: str | Path) -> dict[str, float]:
    """Measure the weights of a finished run on its test data, within its budget.

    Args:
        run: the run's folder.

    Returns:
        `test_loss`, `test_accuracy` and `test_f1`.

    Raises:
        CheckpointError: no run is there, or it has not finished.
        ConfigError: its data has no test part, or it was started from Python with a model or data of its own.
    """
    path = Path(run)
    with RunDirectory.open(path) as rundir, _threads() as threads:
        config = FitConfig.from_json(rundir.config_json())
        state = State.from_journal(rundir.journal())
        if state.stage != "done":
            raise CheckpointError(f"{path} has not finished; fit --resume --workdir {path} goes on with it")
        sources = named_inputs(config)
        if "test" not in sources[2]:
            raise ConfigError(f"data {config.data} has no test part to evaluate {path} on")
        rehearse()
        with open_workload(config, sources) as (device, workload):
            check_same_data(state, workload, path)
            plan = Plan.from_json(state.plan)
            counter = IoCounter()
            folder = rundir.path / "evaluation"
            try:
                weights = build_weights(workload, plan, folder, counter, trained=rundir.path / "model.safetensors")
                run_ = Run(workload, plan, device, rundir, weights, state, threads, counter, Display())
                return score(run_, workload)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                clear(rundir)


def export(run: str | Path, *, exit: str | int = "auto", out: str | Path | None = None) -> dict[str, Any]:
    """Write the model of a finished run, up to one of its exits, for plain PyTorch.

    Args:
        run: the run's folder.
        exit: the number of an exit, from 1, the whole model's being the last; "auto" takes the one that the run has chosen.
        out: folder for `model.pt2` (a `torch.export` program of any batch size, in eval mode) and `model.safetensors`; None takes
            `RUN/exit-K`.

    Returns:
        `exit`, `layer`, `params`, `val_accuracy`, and the files `program` and `weights`.

    Raises:
        CheckpointError: no run is there, it has not finished, or its files are damaged.
        ConfigError: it has no such exit, or was started from Python with a model or data of its own.
    """
    path = Path(run)
    with RunDirectory.open(path) as rundir:
        config = FitConfig.from_json(rundir.config_json())
        if State.from_journal(rundir.journal()).stage != "done":
            raise CheckpointError(f"{path} has not finished; fit --resume --workdir {path} goes on with it")
        result = _read_result(path)
        workload = make_workload(config, *named_inputs(config), torch.device("cpu"))
        return export_exit(workload, result, find_exit(result, exit, path), path, None if out is None else Path(out))


def start_run(
    config: FitConfig,
    workdir: Path,
    *,
    overwrite: bool = False,
    display: Display | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    rank: Rank = ALONE,
) -> Result | None:
    """Begin a run whose model and data have names; None where another rank has the result."""
    return _train(
        config,
        workdir,
        lambda: named_inputs(config),
        overwrite=overwrite,
        display=display or Display(),
        should_stop=should_stop,
        rank=rank,
    )


def resume_run(
    workdir: Path,
    *,
    display: Display | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    after_crash: bool = False,
    rank: Rank = ALONE,
) -> Result | None:
    """Go on with a run from its last commit; None where another rank has the result.

    Args:
        workdir: its folder.
        display: is told of the run's progress.
        should_stop: asked after every batch.
        after_crash: the last process died at the wall: halve the micro-batch of the partition that was resident.
        rank: which of several processes this is.
    """
    if not rank.is_alone and rank.number and not (workdir / "journal.json").exists():
        return _begin_late(workdir, rank, display or Display(), should_stop)
    with RunDirectory.open(workdir) as rundir:
        config = FitConfig.from_json(rundir.config_json())
        if rundir.journal()["stage"] == "done":
            return _read_result(workdir)
    return _train(
        config,
        workdir,
        lambda: named_inputs(config),
        resume=True,
        display=display or Display(),
        should_stop=should_stop,
        after_crash=after_crash,
        rank=rank,
    )


def _begin_late(workdir: Path, rank: Rank, display: Display, should_stop: Callable[[], bool]) -> Result | None:
    """Resume a rank that has no run: it never had one, or the first rank has joined it and is done."""
    first = workdir.with_name(workdir.name.removesuffix(f".rank{rank.number}"))
    if not (first / "journal.json").exists():
        raise CheckpointError(f"{first} holds no run to resume; leave --resume out to begin")
    if read_journal(first / "journal.json")[0]["stage"] == "done":
        return None
    config = FitConfig.from_json((first / "config.json").read_text())
    return start_run(config, workdir, display=display, should_stop=should_stop, rank=rank)


def plan_run(config: FitConfig, *, timing: bool = True) -> PlanReport:
    """The plan of a run whose model and data have names; with all methods side by side where they are to be timed."""
    return _plan(config, lambda: named_inputs(config), timing)


def _train(
    config: FitConfig,
    path: Path,
    sources: Callable[[], Inputs],
    *,
    resume: bool = False,
    overwrite: bool = False,
    display: Display,
    should_stop: Callable[[], bool] = lambda: False,
    after_crash: bool = False,
    rank: Rank = ALONE,
) -> Result | None:
    rank.check(config)
    allow_many_files()
    # The caller's random state stays his.
    with torch.random.fork_rng(devices=[]), _full_is_a_budget_error(), _threads() as threads, _closing(display):
        # What has to be there before the floor is taken: imports, open data, threads.
        if config.compile:
            check_compiler()
        inputs = sources()
        rehearse()
        with open_workload(config, inputs, rank, display) as (device, workload):
            costs = profile_workload(workload, device)
            clock = TimeEstimator.measured(workload, costs, device)
            if resume:
                # WorkerThreads end first: a commit that is under way needs the lock.
                with RunDirectory.open(path) as rundir, closing(threads):
                    check_same_options(config, FitConfig.from_json(rundir.config_json()), path)
                    state = State.from_journal(rundir.journal())
                    check_same_data(state, workload, path)
                    check_same_rank(state, rank, path)
                    if state.stage == TRAINED:
                        return None
                    if state.stage == "done":
                        clear(rundir)
                        return _read_result(path)
                    rundir.cut_metrics(state.metrics_bytes)
                    state.resumed += 1
                    if after_crash:
                        halve(state, workload)
                        state.number += 1
                        rundir.commit(state.to_journal(), config.keep_commits)  # or the next crash would halve it no further
                    return go_on(workload, costs, device, rundir, state, threads, display, should_stop, clock)
            planned = make_plan(workload, costs, device, seconds_of=clock)
            check_disk(workload, planned, costs)
            if (
                config.compile
                and config.micro_batch != 1
                and any(part.micro_batch == 1 < part.batch for part in planned.partitions)
            ):
                display.message("one sample at a time is not compiled unless it is asked for; give --micro-batch 1")
            state = first_state(workload, planned, rank)
            with RunDirectory.create(path, config.to_json(), state.to_journal(), overwrite=overwrite) as rundir, closing(threads):
                return go_on(workload, costs, device, rundir, state, threads, display, should_stop, clock)


def _read_result(path: Path) -> Result:
    """What a finished run came to."""
    try:
        if not (path / "model.safetensors").is_file():
            raise CheckpointError(
                f"{path / 'model.safetensors'} is missing; restore it from a copy, or begin again with --overwrite"
            )
        return Result.from_json((path / "result.json").read_text())
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path / 'result.json'} cannot be read; restore it from a copy, or begin again with --overwrite"
        ) from error


def _plan(config: FitConfig, sources: Callable[[], Inputs], timing: bool) -> PlanReport:
    if config.compile:
        check_compiler()
    known = Known()
    with open_workload(config, sources()) as (device, workload):
        costs = profile_workload(workload, device, known)
        bench = LayerBenchmark(device)
        report = describe_plan(workload, costs, device, TimeEstimator.measured(workload, costs, device, bench))
        # Layers are timed as they are, without code.
        if not timing or config.compile:
            return report
        return dataclasses.replace(report, prospects=compare(workload, costs, bench, known))


@contextmanager
def _full_is_a_budget_error() -> Iterator[None]:
    """Running out of memory outside of a batch, which could have been made smaller, ends the run."""
    try:
        yield
    except LowMemError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise BudgetError(f"memory ran out outside of a batch: {reason}; give a larger --max-gpu-mem") from error


@contextmanager
def _threads() -> Iterator[WorkerThreads]:
    threads = WorkerThreads()
    try:
        yield threads
    finally:
        threads.close()


@contextmanager
def _closing(display: Display) -> Iterator[None]:
    try:
        yield
    finally:
        display.close()

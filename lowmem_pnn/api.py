"""The public functions: `fit`, `plan`, `evaluate`, `export`, and what the command line calls for them."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import resumed_config
from lowmem_pnn.config.workdir import next_workdir
from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import BudgetError, CheckpointError, ConfigError, LowMemError
from lowmem_pnn.model.compiler import check_compiler
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.comparison import compare_methods
from lowmem_pnn.planning.describe import describe_plan
from lowmem_pnn.planning.disk_footprint import check_disk
from lowmem_pnn.planning.make_plan import make_plan
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.time_estimate import TimeEstimator
from lowmem_pnn.profiling.benchmark import LayerBenchmark
from lowmem_pnn.profiling.profiler import MeasurementCache
from lowmem_pnn.reporting.plan_report import PlanReport
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.ranks import ALONE, Rank
from lowmem_pnn.run.resume import check_same_data, count_resume, resumed_state
from lowmem_pnn.run.run import Run
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.state import State
from lowmem_pnn.run.unfinished import unfinished_run
from lowmem_pnn.stores.disk import allow_many_files
from lowmem_pnn.stores.run_directory import RunDirectory, read_journal
from lowmem_pnn.training.export import export_exit, find_exit
from lowmem_pnn.training.initial_weights import build_weights
from lowmem_pnn.training.lifecycle import clear, run_to_end, score
from lowmem_pnn.training.setup import open_workload, warm_up_profiler
from lowmem_pnn.workload import make_workload, profile_workload
from lowmem_pnn.workload.inputs import Inputs, Model, name_of, named_inputs, python_inputs

OpenInputs = Callable[[FitConfig], Inputs]
"""Opens model and data for a configuration."""


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
        workdir: the run's folder; None takes the next free one under `runs`, or, to resume, that of the only unfinished run there
            that was begun with the same options.
        resume: go on with a run; options may be given as before, or left out. A finished run gives its result.
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
    if resume and overwrite:
        raise ConfigError("resume goes on with a run, and overwrite replaces it; give one")
    given = {"max_gpu_mem": max_gpu_mem, **_names(model, train), **options}
    open_inputs = python_inputs(model, train, val, test)
    if resume:
        folder = unfinished_run(given) if workdir is None else Path(workdir)
        result = _resume(folder, given, open_inputs, display=display or Display())
    else:
        config = configure(**given)
        folder = next_workdir(config) if workdir is None else Path(workdir)
        result = _begin(config, folder, open_inputs, overwrite=overwrite, display=display or Display())
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
    config = configure(max_gpu_mem=max_gpu_mem, **_names(model, train), **options)
    return _plan(config, python_inputs(model, train, val, None), timing)


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
    with RunDirectory.open(path) as rundir, _worker_threads() as threads:
        config, state = _finished(rundir)
        inputs = named_inputs(config)
        if "test" not in inputs[2]:
            raise ConfigError(f"data {config.data} has no test part to evaluate {path} on")
        warm_up_profiler()
        with open_workload(config, inputs) as (device, workload):
            check_same_data(state, workload, path)
            plan = Plan.from_json(state.plan)
            session = Session(device, rundir, threads)
            folder = path / "evaluation"
            try:
                weights = build_weights(workload, plan, folder, session.counter, trained=path / "model.safetensors")
                return score(Run(session, workload, plan, weights, state))
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
        config, _ = _finished(rundir)
        result = _read_result(path)
        workload = make_workload(config, *named_inputs(config), torch.device("cpu"))
        return export_exit(workload, result, find_exit(result, exit, path), path, None if out is None else Path(out))


def begin_run(
    config: FitConfig,
    workdir: Path,
    *,
    overwrite: bool = False,
    display: Display | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    rank: Rank = ALONE,
) -> Result | None:
    """Begin a run whose model and data have names.

    Args:
        config: options of the run.
        workdir: folder of the run.
        overwrite: replace the run that is there.
        display: is told of the run's progress.
        should_stop: asked after every batch.
        rank: which of several processes this is.

    Returns:
        What `result.json` says; None where another process has the result.
    """
    open_inputs = named_inputs
    return _begin(
        config, workdir, open_inputs, overwrite=overwrite, display=display or Display(), should_stop=should_stop, rank=rank
    )


def resume_run(
    workdir: Path,
    options: Mapping[str, Any] | None = None,
    *,
    display: Display | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    after_crash: bool = False,
    rank: Rank = ALONE,
) -> Result | None:
    """Go on with a run, whose model and data have names, from its last commit.

    Args:
        workdir: folder of the run.
        options: fields of `FitConfig` that are given again; see `resumed_config`.
        display: is told of the run's progress.
        should_stop: asked after every batch.
        after_crash: whether the last process died at the memory limit: the micro-batch that was in use is then halved.
        rank: which of several processes this is.

    Returns:
        What `result.json` says; None where another process has the result.
    """
    display = display or Display()
    if not rank.is_alone and rank.number and not (workdir / "journal.json").exists():
        return _begin_late(workdir, options or {}, rank, display, should_stop)
    return _resume(
        workdir,
        options or {},
        named_inputs,
        display=display,
        should_stop=should_stop,
        after_crash=after_crash,
        rank=rank,
    )


def plan_run(config: FitConfig, *, timing: bool = True) -> PlanReport:
    """Return the plan of a run whose model and data have names.

    Args:
        config: options of the run.
        timing: time layers, and show all methods side by side.
    """
    return _plan(config, named_inputs, timing)


def _names(model: Model, train: Any) -> dict[str, str]:
    """Return what a run's configuration calls model and data."""
    return {"model": name_of(model), "data": train if isinstance(train, str) else f"python:{type(train).__name__}"}


def _begin(
    config: FitConfig,
    path: Path,
    open_inputs: OpenInputs,
    *,
    overwrite: bool,
    display: Display,
    should_stop: Callable[[], bool] = lambda: False,
    rank: Rank = ALONE,
) -> Result | None:
    rank.check(config)
    with _environment(display) as threads:
        inputs = _open_before_floor(config, open_inputs)
        with open_workload(config, inputs, rank, display) as (device, workload):
            profile = profile_workload(workload, device)
            request = PlanRequest(workload, profile, device)
            estimator = TimeEstimator.measured(request)
            planned = make_plan(request, estimator)
            check_disk(workload, planned, profile)
            if (
                config.compile
                and config.micro_batch != 1
                and any(part.micro_batch == 1 < part.batch for part in planned.partitions)
            ):
                display.message("one sample at a time is not compiled unless it is asked for; give --micro-batch 1")
            state = State.first(workload, planned, rank)
            # Threads end first: a commit that is under way needs the lock.
            with RunDirectory.create(path, config.to_json(), state.to_journal(), overwrite=overwrite) as rundir, closing(threads):
                session = Session(device, rundir, threads, display, should_stop)
                return run_to_end(session, workload, profile, state, estimator)


def _resume(
    path: Path,
    options: Mapping[str, Any],
    open_inputs: OpenInputs,
    *,
    display: Display,
    should_stop: Callable[[], bool] = lambda: False,
    after_crash: bool = False,
    rank: Rank = ALONE,
) -> Result | None:
    with RunDirectory.open(path) as rundir:
        config = resumed_config(FitConfig.from_json(rundir.config_json()), options, path)
        stage = rundir.journal()["stage"]
        if stage == "done":
            clear(rundir)
            return _read_result(path)
        if stage == "trained":
            return None
    rank.check(config)
    with _environment(display) as threads:
        inputs = _open_before_floor(config, open_inputs)
        with open_workload(config, inputs, rank, display) as (device, workload):
            profile = profile_workload(workload, device)
            estimator = TimeEstimator.measured(PlanRequest(workload, profile, device))
            with RunDirectory.open(path) as rundir, closing(threads):
                state = resumed_state(rundir, workload, rank)
                count_resume(rundir, state, workload, after_crash=after_crash)
                return run_to_end(Session(device, rundir, threads, display, should_stop), workload, profile, state, estimator)


def _begin_late(
    workdir: Path, options: Mapping[str, Any], rank: Rank, display: Display, should_stop: Callable[[], bool]
) -> Result | None:
    """Resume a process of several that has no run: it never had one, or the first process has joined it and is done."""
    first = workdir.with_name(workdir.name.removesuffix(f".rank{rank.number}"))
    if not (first / "journal.json").exists():
        raise CheckpointError(f"{first} holds no run to resume; leave --resume out to begin")
    if read_journal(first / "journal.json")[0]["stage"] == "done":
        return None
    stored = FitConfig.from_json((first / "config.json").read_text())
    resumed_config(stored, options, first)
    return begin_run(stored, workdir, display=display, should_stop=should_stop, rank=rank)


def _plan(config: FitConfig, open_inputs: OpenInputs, timing: bool) -> PlanReport:
    if config.compile:
        check_compiler()
    cache = MeasurementCache()
    with open_workload(config, open_inputs(config)) as (device, workload):
        request = PlanRequest(workload, profile_workload(workload, device, cache), device)
        benchmark = LayerBenchmark(device)
        report = describe_plan(request, TimeEstimator.measured(request, benchmark))
        # Layers are timed as they are, uncompiled.
        if not timing or config.compile:
            return report
        return dataclasses.replace(report, prospects=compare_methods(request, benchmark, cache))


def _finished(rundir: RunDirectory) -> tuple[FitConfig, State]:
    """Return options and state of a run that has finished.

    Raises:
        CheckpointError: it has not.
    """
    state = State.from_journal(rundir.journal())
    if state.stage != "done":
        raise CheckpointError(f"{rundir.path} has not finished; fit --resume --workdir {rundir.path} goes on with it")
    return FitConfig.from_json(rundir.config_json()), state


def _read_result(path: Path) -> Result:
    """Return what a finished run came to."""
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


def _open_before_floor(config: FitConfig, open_inputs: OpenInputs) -> Inputs:
    """Open what has to be there before the floor is taken: model and data, and what libraries import on their first use."""
    if config.compile:
        check_compiler()
    inputs = open_inputs(config)
    warm_up_profiler()
    return inputs


@contextmanager
def _environment(display: Display) -> Iterator[WorkerThreads]:
    """What a training needs around it: the caller's random state kept, background threads, and a display that is closed at the end."""
    allow_many_files()
    with torch.random.fork_rng(devices=[]), _full_is_a_budget_error(), _worker_threads() as threads:
        try:
            yield threads
        finally:
            display.close()


@contextmanager
def _full_is_a_budget_error() -> Iterator[None]:
    """Memory that runs out outside of a batch, which could have been made smaller, ends the run."""
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
def _worker_threads() -> Iterator[WorkerThreads]:
    threads = WorkerThreads()
    try:
        yield threads
    finally:
        threads.close()

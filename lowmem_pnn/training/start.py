"""Start: a run that is begun, or gone on with, from its options to its result."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from lowmem_pnn.compilation.compiler import check_compiler
from lowmem_pnn.config.code import python_objects
from lowmem_pnn.config.defaults import training_words
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import check_trust, resumed_config, with_new_modules
from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import BudgetError, CheckpointError, ConfigError, LowMemError
from lowmem_pnn.evaluation.text_samples import check_samples
from lowmem_pnn.language.progress import telling
from lowmem_pnn.planning.disk_footprint import check_disk, disk_notes, free_disk_bytes
from lowmem_pnn.planning.make_plan import make_plan
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.time_estimate import TimeEstimator
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.reporting.tables import describe_skipped
from lowmem_pnn.run.callbacks import Callback, Callbacks
from lowmem_pnn.run.finished import read_result
from lowmem_pnn.run.loggers import open_logger
from lowmem_pnn.run.ranks import ALONE, Rank
from lowmem_pnn.run.resume import (
    check_metrics,
    check_same_rank,
    check_same_weights,
    count_resume,
    go_on_from_the_end,
    resumed_state,
    stored_config,
    with_the_visits_it_began_with,
)
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.state import State
from lowmem_pnn.samples.reader_process import READER_VARIABLE
from lowmem_pnn.seeds import preserve_gpu_random_state
from lowmem_pnn.settings.config_file import CONFIG_FILE, to_toml
from lowmem_pnn.stores.disk import allow_many_files, file_system_faults, write_durably
from lowmem_pnn.stores.journal import read_journal
from lowmem_pnn.stores.run_directory import RunDirectory, read_config
from lowmem_pnn.training.join import forget
from lowmem_pnn.training.lifecycle import run_to_end
from lowmem_pnn.training.setup import only_run, open_workload, reading, warm_up_profiler
from lowmem_pnn.workload import profile_workload
from lowmem_pnn.workload.inputs import Inputs, named_inputs, without_weights

_AS_FILE = "# The options of this run: lowmem-pnn fit --config config.toml begins another one like it.\n"
_AS_FILE_FROM_PYTHON = (
    "# The options of this run; it was started from Python, with {}, which lowmem_pnn.fit takes anew to begin another one.\n"
)

OpenInputs = Callable[[FitConfig], Inputs]
"""Opens model and data for a configuration."""


def begin(
    config: FitConfig,
    path: Path,
    open_inputs: OpenInputs = named_inputs,
    *,
    overwrite: bool = False,
    display: Display | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    callbacks: Sequence[Callback] = (),
    rank: Rank = ALONE,
) -> Result | None:
    """Begin a run.

    Args:
        config: options of the run.
        path: folder of the run.
        open_inputs: opens model and data; by default those that the options name.
        overwrite: replace the run that is there.
        display: is told of the run's progress; None shows nothing.
        should_stop: asked after every batch.
        callbacks: are told of steps, epochs and commits.
        rank: which of several processes this is.

    Returns:
        What `result.json` says; None where another process has the result.
    """
    _refuse_in_reader()
    rank.check(config)
    display = display or Display()
    with file_system_faults(path), _environment(display) as threads, open_logger(config, display) as loggers:
        inputs = _open_before_floor(config, open_inputs, display)
        with reading(config, inputs, display) as inputs, open_workload(config, inputs, rank, display) as (device, workload):
            check_samples(workload)
            display.stage("planning")
            profile = profile_workload(workload, device)
            free = free_disk_bytes(path)
            request = PlanRequest(workload, profile, device, free_disk_bytes=free)
            estimator = TimeEstimator.measured(request)
            planned = make_plan(request, estimator)
            check_disk(workload, planned, profile)
            for note in disk_notes(workload, planned, profile, free):
                display.message(note)
            device.enforce(profile.untouched_bytes)
            if (
                config.compile
                and config.micro_batch != 1
                and any(part.micro_batch == 1 < part.batch for part in planned.partitions)
            ):
                display.message("one sample at a time is not compiled unless it is asked for; give --micro-batch 1")
            state = State.first(workload, planned, rank)
            # Threads end first: a commit that is under way needs the lock.
            with RunDirectory.create(path, config.to_json(), state.to_journal(), overwrite=overwrite) as rundir, closing(threads):
                _write_options(path, config)
                session = Session(
                    device, rundir, threads, display, _or_late(should_stop, config), Callbacks((*callbacks, *loggers))
                )
                return run_to_end(session, workload, profile, state, estimator)


def resume(
    path: Path,
    options: Mapping[str, Any] | None = None,
    open_inputs: OpenInputs = named_inputs,
    *,
    display: Display | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    callbacks: Sequence[Callback] = (),
    after_crash: bool = False,
    seconds_spent: float = 0.0,
    rank: Rank = ALONE,
    trust: bool = False,
) -> Result | None:
    """Go on with a run from its last commit.

    Args:
        path: folder of the run.
        options: fields of `FitConfig` that are given again; see `resumed_config`.
        open_inputs: opens model and data, which must be as before.
        display: is told of the run's progress; None shows nothing.
        should_stop: asked after every batch.
        callbacks: are told of steps, epochs and commits.
        after_crash: whether the last process died at the memory limit: the micro-batch that was in use is then halved.
        seconds_spent: seconds that processes which died have spent of the time limit.
        rank: which of several processes this is.
        trust: whether code that the run names for its model or data is run without being named in `options` again.

    Returns:
        What `result.json` says; None where another process has the result.
    """
    _refuse_in_reader()
    options, display = options or {}, display or Display()
    if rank.number and not (path / "journal.json").exists():
        return _begin_late(path, options, rank, display, should_stop, trust=trust)
    instead = ", or leave --resume out to begin one"
    with file_system_faults(path), RunDirectory.open(path, to_read=True, instead=instead) as rundir:
        before = stored_config(rundir)
        config = resumed_config(before, options, path)
        is_longer = config.epochs != before.epochs
        config = with_the_visits_it_began_with(config, rundir)
        state = State.from_journal(rundir.journal(), path)
        if state.stage == "done" and not is_longer:
            result = read_result(path, state)
            rundir.clear()
            forget(rundir, state)
            return result
        rundir.check_writable()
        check_same_rank(state, rank, path)
        if state.stage == "trained":
            return None
        for damaged in rundir.damaged_journals():
            display.message(f"{damaged} is no whole commit of this run, and is left alone; going on from {path / 'journal.json'}")
    check_trust(config, options, path, trust=trust)
    rank.check(config)
    with file_system_faults(path), _environment(display) as threads, open_logger(config, display) as loggers:
        inputs = _open_before_floor(config, open_inputs, display)
        check_same_weights(state, inputs.source, path)
        check_metrics(state, inputs.own.metrics, path)
        if state.stage != "born":
            inputs = without_weights(inputs)  # the run's files have them
            config = with_new_modules(config, state.pretrained)
        with reading(config, inputs, display) as inputs, open_workload(config, inputs, rank, display) as (device, workload):
            profile = profile_workload(workload, device)
            estimator = TimeEstimator.measured(PlanRequest(workload, profile, device))
            with RunDirectory.open(path) as rundir, closing(threads):
                state = resumed_state(rundir, workload, rank)
                if is_longer:
                    if state.stage == "done":
                        go_on_from_the_end(state, before, workload, path)
                    state.epochs = config.epochs[0]
                if is_longer or not (path / CONFIG_FILE).exists():  # as where the process that began it was killed at once
                    _write_options(path, config)
                device.enforce(profile.untouched_bytes)
                count_resume(rundir, state, workload, after_crash=after_crash)
                session = Session(
                    device,
                    rundir,
                    threads,
                    display,
                    _or_late(should_stop, config, seconds_spent),
                    Callbacks((*callbacks, *loggers)),
                    after_crash=after_crash,
                )
                return run_to_end(session, workload, profile, state, estimator)


def _write_options(path: Path, config: FitConfig) -> None:
    """Write the options of a run as a file that begins another one like it."""
    objects = python_objects(vars(config))
    head = _AS_FILE_FROM_PYTHON.format(", ".join(objects)) if objects else _AS_FILE
    write_durably(path / CONFIG_FILE, head + to_toml(config))


def _begin_late(
    workdir: Path, options: Mapping[str, Any], rank: Rank, display: Display, should_stop: Callable[[], bool], *, trust: bool
) -> Result | None:
    """Resume a process of several that has no run: it never had one, or the first process has joined it and is done."""
    first = workdir.with_name(workdir.name.removesuffix(f".rank{rank.number}"))
    if not (first / "journal.json").exists():
        raise CheckpointError(f"{first} holds no run to resume; leave --resume out to begin")
    body, config_sha256 = read_journal(first / "journal.json")
    if State.from_journal(body, first).stage == "done":
        return None
    stored = FitConfig.from_json(read_config(first, config_sha256))
    resumed_config(stored, options, first)
    check_trust(stored, options, first, trust=trust)
    return begin(stored, workdir, named_inputs, overwrite=False, display=display, should_stop=should_stop, rank=rank)


def _or_late(should_stop: Callable[[], bool], config: FitConfig, seconds_spent: float = 0.0) -> Callable[[], bool]:
    """Return what says that a run is to stop: it was asked to, or its time is over."""
    if config.time_limit is None:
        return should_stop
    end = time.monotonic() + config.time_limit - seconds_spent
    return lambda: should_stop() or time.monotonic() >= end


def _refuse_in_reader() -> None:
    """Refuse to train in a process that reads samples, and has imported the user's script for the data set that it defines."""
    if READER_VARIABLE in os.environ:
        raise ConfigError("data workers re-import your script; guard the training with `if __name__ == '__main__':`")


def _open_before_floor(config: FitConfig, open_inputs: OpenInputs, display: Display) -> Inputs:
    """Open what has to be there before the floor is taken: model and data, and what libraries import on their first use."""
    display.stage("opening data and model")
    if config.compile:
        check_compiler()
    if config.skip_broken:
        display.message("reading every sample once, to leave out broken ones (--skip-broken)")
    with telling(display.message):
        inputs = open_inputs(config)
    skipped = inputs.dataset.skipped_samples
    if skipped["count"]:
        display.message(describe_skipped(skipped["names"], skipped["count"]))
    display.message(f"data: {inputs.dataset.parts}")
    if inputs.dataset.preprocessing:
        display.message(f"samples: {inputs.dataset.preprocessing}")
    if inputs.source.weights is not None:
        display.message(f"training: {training_words(config)}")
    warm_up_profiler()
    return inputs


@contextmanager
def _environment(display: Display) -> Iterator[WorkerThreads]:
    """What a training needs around it: the caller's random state kept, background threads, and a display that is closed at the end."""
    allow_many_files()
    with (
        only_run(),
        torch.random.fork_rng(devices=[]),
        preserve_gpu_random_state(),
        full_is_a_budget_error(),
        worker_threads() as threads,
    ):
        try:
            yield threads
        finally:
            display.close()


@contextmanager
def full_is_a_budget_error() -> Iterator[None]:
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
def worker_threads() -> Iterator[WorkerThreads]:
    """Start background threads, and end them at the end."""
    threads = WorkerThreads()
    try:
        yield threads
    finally:
        threads.close()

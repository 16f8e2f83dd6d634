"""Start: a run that is begun, or gone on with, from its options to its result."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem_pnn.compilation.compiler import check_compiler
from lowmem_pnn.config.code import python_objects
from lowmem_pnn.config.defaults import training_words
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import PLACES, check_trust, raised, resumed_config, with_new_modules
from lowmem_pnn.device import Device, is_out_of_memory
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import BudgetError, CheckpointError, ConfigError, LowMemError
from lowmem_pnn.evaluation.text_samples import check_samples
from lowmem_pnn.language.progress import telling
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.disk_footprint import check_disk, disk_notes, free_disk_bytes
from lowmem_pnn.planning.make_plan import make_plan
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.time_estimate import TimeEstimator
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.reporting.tables import describe_skipped
from lowmem_pnn.run.callbacks import Callback, Callbacks
from lowmem_pnn.run.finished import read_result
from lowmem_pnn.run.loggers import open_logger
from lowmem_pnn.run.only_run import only_run
from lowmem_pnn.run.process import UNWATCHED, Process
from lowmem_pnn.run.provenance import check_provenance, provenance
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
from lowmem_pnn.training.setup import open_workload, reading, warm_up_profiler
from lowmem_pnn.workload import Workload, profile_workload
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
    process: Process = UNWATCHED,
) -> Result | None:
    """Begin a run.

    Args:
        config: options of the run.
        path: folder of the run.
        open_inputs: opens model and data; by default those that the options name.
        overwrite: replace the run that is there.
        process: who watches this process, and which of several it is.

    Returns:
        What `result.json` says; None where another process has the result.
    """
    _refuse_in_reader()
    with _beside(config, path, process) as beside:
        inputs = _open_before_floor(config, open_inputs, process.display)
        with _workload_on_device(config, inputs, process) as (device, workload):
            check_samples(workload)
            process.display.stage("planning")
            profile = profile_workload(workload, device)
            planned, estimator = _first_plan(workload, profile, device, path, process.display)
            device.enforce(profile.untouched_bytes)
            if (
                config.compile
                and config.micro_batch != 1
                and any(part.micro_batch == 1 < part.batch for part in planned.partitions)
            ):
                process.display.message("one sample at a time is not compiled unless it is asked for; give --micro-batch 1")
            state = State.first(workload, planned, process.rank)
            state.provenance = provenance(workload, device)
            # Threads end first: a commit that is under way needs the lock.
            with (
                RunDirectory.create(path, config.to_json(), state.to_journal(), overwrite=overwrite) as rundir,
                closing(beside.threads),
            ):
                _write_options(path, config)
                return run_to_end(beside.session(device, rundir, config, process), workload, profile, state, estimator)


def resume(
    path: Path,
    options: Mapping[str, Any] | None = None,
    open_inputs: OpenInputs = named_inputs,
    *,
    process: Process = UNWATCHED,
    trust: bool = False,
) -> Result | None:
    """Go on with a run from its last commit.

    Args:
        path: folder of the run.
        options: fields of `FitConfig` that are given again; see `resumed_config`.
        open_inputs: opens model and data, which must be as before.
        process: who watches this process, which of several it is, and how the one before it ended.
        trust: whether code that the run names for its model or data is run without being named in `options` again.

    Returns:
        What `result.json` says; None where another process has the result.
    """
    _refuse_in_reader()
    options, rank, display = options or {}, process.rank, process.display
    if rank.number and not (path / "journal.json").exists():
        return _begin_late(path, options, process, trust=trust)
    instead = ", or leave --resume out to begin one"
    with file_system_faults(path), RunDirectory.open(path, to_read=True, instead=instead) as rundir:
        before = stored_config(rundir)
        config = resumed_config(before, options, path)
        is_longer = config.epochs != before.epochs
        config = with_the_visits_it_began_with(config, rundir)
        state = State.from_journal(rundir.journal(), path)
        if config.device == "auto" and state.provenance.get("device") == "cpu":
            config = dataclasses.replace(config, device="cpu")  # a GPU that is there now is none that it was planned for
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
    with _beside(config, path, process) as beside:
        inputs = _open_before_floor(config, open_inputs, display)
        check_same_weights(state, inputs.source, path)
        check_metrics(state, inputs.own.metrics, path)
        if state.stage != "born":
            inputs = without_weights(inputs)  # the run's files have them
            config = with_new_modules(config, state.pretrained)
        with _workload_on_device(config, inputs, process) as (device, workload):
            profile = profile_workload(workload, device)
            estimator = TimeEstimator.measured(PlanRequest(workload, profile, device))
            with RunDirectory.open(path) as rundir, closing(beside.threads):
                # Another model is no broken journal.
                change = check_provenance(state.provenance, provenance(workload, device), path, workload.source.spec)
                state = resumed_state(rundir, workload, rank)
                if change is not None:
                    display.message(change)
                    state.changes = list(dict.fromkeys([*state.changes, change]))
                state.moved |= {name: getattr(config, name) for name in PLACES if getattr(config, name) != getattr(before, name)}
                if is_longer:
                    if state.stage == "done":
                        go_on_from_the_end(state, before, workload, path)
                    state.epochs = config.epochs[0]
                if is_longer or not (path / CONFIG_FILE).exists():  # as where the process that began it was killed at once
                    _write_options(path, config)
                device.enforce(profile.untouched_bytes)
                count_resume(rundir, state, workload, after_crash=process.after_crash)
                return run_to_end(beside.session(device, rundir, config, process), workload, profile, state, estimator)


def _begin_late(workdir: Path, options: Mapping[str, Any], process: Process, *, trust: bool) -> Result | None:
    """Resume a process of several that has no run: it never had one, or the first process has joined it and is done."""
    first = workdir.with_name(workdir.name.removesuffix(f".rank{process.rank.number}"))
    if not (first / "journal.json").exists():
        raise CheckpointError(f"{first} holds no run to resume; leave --resume out to begin")
    body, config_sha256 = read_journal(first / "journal.json")
    if State.from_journal(body, first).stage == "done":
        return None
    stored = raised(FitConfig.from_json(read_config(first, config_sha256)), body)
    config = resumed_config(stored, options, first)
    check_trust(stored, options, first, trust=trust)
    return begin(config, workdir, process=process)


def _first_plan(
    workload: Workload, profile: MemoryProfile, device: Device, path: Path, display: Display
) -> tuple[Plan, TimeEstimator]:
    """Plan a run that is to begin in a folder, and say what its disk has no room for; return what predicted its seconds, too."""
    free = free_disk_bytes(path)
    request = PlanRequest(workload, profile, device, free_disk_bytes=free)
    estimator = TimeEstimator.measured(request)
    planned = make_plan(request, estimator)
    check_disk(workload, planned, profile)
    for note in disk_notes(workload, planned, profile, free):
        display.message(note)
    return planned, estimator


@dataclass(frozen=True)
class _Beside:
    """What works beside a training: threads in the background, and the loggers that the options ask for."""

    threads: WorkerThreads
    loggers: tuple[Callback, ...]

    def session(self, device: Device, rundir: RunDirectory, config: FitConfig, process: Process) -> Session:
        """Return the session of a process; the rest of its time limit begins now."""
        should_stop, callbacks = process.stop_or_limit(config), Callbacks((*process.callbacks, *self.loggers))
        after_crash = process.after_crash
        return Session(device, rundir, self.threads, process.display, should_stop, callbacks, after_crash=after_crash)


@contextmanager
def _beside(config: FitConfig, path: Path, process: Process) -> Iterator[_Beside]:
    """Begin what works beside a training of this process, and end it with the context."""
    process.rank.check(config)
    display = process.display
    with file_system_faults(path), _environment(display) as threads, open_logger(config, display) as loggers:
        yield _Beside(threads, loggers)


@contextmanager
def _workload_on_device(config: FitConfig, inputs: Inputs, process: Process) -> Iterator[tuple[Device, Workload]]:
    """Open the training device, and make the workload on it, with the processes that read its samples."""
    with (
        reading(config, inputs, process.display) as read,
        open_workload(config, read, process.rank, process.display) as device_and_workload,
    ):
        yield device_and_workload


def _write_options(path: Path, config: FitConfig) -> None:
    """Write the options of a run as a file that begins another one like it."""
    objects = python_objects(vars(config))
    head = _AS_FILE_FROM_PYTHON.format(", ".join(objects)) if objects else _AS_FILE
    write_durably(path / CONFIG_FILE, head + to_toml(config))


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

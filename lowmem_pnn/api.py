"""The public functions: `fit`, `plan`, `evaluate`, `export`, `load_weights`."""

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lowmem_pnn.compilation.compiler import check_compiler
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import check_trust
from lowmem_pnn.config.workdir import next_workdir
from lowmem_pnn.errors import CheckpointError, ConfigError
from lowmem_pnn.formats.data_loader import loader_options
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.comparison import compare_methods
from lowmem_pnn.planning.describe import describe_plan
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.time_estimate import TimeEstimator
from lowmem_pnn.profiling.benchmark import LayerBenchmark
from lowmem_pnn.profiling.memory_profiler import MeasurementCache
from lowmem_pnn.reporting.plan_report import PlanReport
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.callbacks import Callback
from lowmem_pnn.run.finished import open_finished
from lowmem_pnn.run.resume import check_plan, check_same_data
from lowmem_pnn.run.run import Run
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.unfinished import unfinished_run
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.stores.disk import file_system_faults
from lowmem_pnn.stores.keys import VERSIONS_KEY
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.tasks import OwnLoss, OwnMetrics
from lowmem_pnn.tasks.scores import with_prefix
from lowmem_pnn.training.export import export_exit, find_exit
from lowmem_pnn.training.export_folder import ExportFolder
from lowmem_pnn.training.initial_weights import build_weights
from lowmem_pnn.training.lifecycle import score
from lowmem_pnn.training.setup import open_workload, reading, warm_up_profiler
from lowmem_pnn.training.start import OpenInputs, begin, worker_threads
from lowmem_pnn.training.start import resume as resume_training
from lowmem_pnn.workload import make_workload, profile_workload
from lowmem_pnn.workload.inputs import Model, name_of, named_inputs, python_inputs, without_weights


def fit(
    model: Model,
    train: Any,
    val: Any = None,
    *,
    max_gpu_mem: str | int,
    test: Any = None,
    loss: str | OwnLoss = "auto",
    metrics: OwnMetrics | None = None,
    weights: str | Path | Mapping[str, torch.Tensor] | None = None,
    workdir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Result:
    """Train a model within a memory budget, as the command `lowmem-pnn fit` does.

    Args:
        model: a name as the command takes it, a function that builds the model, or a model. Of a model that does not fit in memory
            only a function (or a name) can train: it is then never built whole in memory.
        train: a data set's name as the command takes it, a map-style torch data set of (x, y), or of dictionaries with one value and one
            label, a torch `DataLoader` of one, whose batch size, order and collation are taken, or a tuple (x, y) of tensors, arrays,
            tables or lists: x (N, ...) numbers, which reach the model as float32 (or, where it looks them up, as int64), y (N, ...) class
            numbers, labels, values or masks; with a loss of your own any tensors, or tuples and dictionaries of them.
        val: a data set, its name, a loader or a tuple to validate on; None takes the validation part that `train` names, or else
            `val_fraction` of `train`.
        max_gpu_mem: the budget, as a size ("2GB") or in bytes.
        test: a data set, its name, a loader or a tuple to test on after training.
        loss: a loss by name, or a function of the model's outputs and the targets, which returns the mean over samples, or a pair (sum,
            count): then the gradient of a batch is that of all sums over all counts, whatever its micro-batches.
        metrics: functions of outputs and targets by name, which return a pair (sum, count), or torchmetrics objects; with such a loss.
        weights: pretrained weights to begin with, as the option `--weights` takes them, or a `state_dict`; then `method` is "exact" and
            `epochs` 3, if they are not given.
        workdir: the run's folder; None takes the next free one under `runs`, or, to resume, that of the only unfinished run there
            that was begun with the same options.
        resume: go on with a run; options may be given as before, or left out. A finished run gives its result.
        overwrite: replace the run in `workdir`.
        display: is told of the run's progress; None shows nothing.
        callbacks: objects of `lowmem_pnn.Callback`, which are told of the start, steps, epochs, commits and the end.
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
    state_dict = weights if isinstance(weights, Mapping) else None
    named = {**_names(model, train, loss), "weights": _named_weights(weights)}
    given = {"max_gpu_mem": max_gpu_mem, **named, **_given(train, val, test, options)}
    val, test = (None if isinstance(part, str) else part for part in (val, test))
    open_inputs = python_inputs(
        model, train, val, test, loss=None if isinstance(loss, str) else loss, metrics=metrics, state_dict=state_dict
    )
    if resume:
        folder = unfinished_run(given) if workdir is None else Path(workdir)
        result = resume_training(folder, given, open_inputs, display=display, callbacks=callbacks)
    else:
        config = configure(**given)
        folder = next_workdir(config) if workdir is None else Path(workdir)
        result = begin(config, folder, open_inputs, overwrite=overwrite, display=display, callbacks=callbacks)
    assert result is not None, "one process trains all partitions"
    return result


def plan(
    model: Model,
    train: Any,
    val: Any = None,
    *,
    max_gpu_mem: str | int,
    loss: str | OwnLoss = "auto",
    weights: str | Path | Mapping[str, torch.Tensor] | None = None,
    timing: bool = True,
    **options: Any,
) -> PlanReport:
    """Show what `fit` with the same arguments would do; nothing is trained or kept.

    Args:
        model: as for `fit`.
        train: as for `fit`.
        val: as for `fit`.
        max_gpu_mem: as for `fit`.
        loss: as for `fit`.
        weights: as for `fit`.
        timing: run layers for a few seconds, within the budget, to say what an epoch of every method takes.
        **options: as for `fit`.

    Returns:
        The partitions, and whether they fit; with `timing` all methods side by side.
    """
    named = {**_names(model, train, loss), "weights": _named_weights(weights)}
    config = configure(max_gpu_mem=max_gpu_mem, **named, **_given(train, val, None, options))
    state_dict = weights if isinstance(weights, Mapping) else None
    own_loss = None if isinstance(loss, str) else loss
    open_inputs = python_inputs(model, train, None if isinstance(val, str) else val, None, loss=own_loss, state_dict=state_dict)
    return _plan(config, open_inputs, timing)


def evaluate(run: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Measure the weights of a finished run on its test data, within its budget.

    Args:
        run: the run's folder, which need not be writable.
        trust: run code that the run names for its model or data (`file.py:factory`).

    Returns:
        `test_loss`, and by task `test_accuracy`, `test_f1` and others; see `Result.scores`.

    Raises:
        CheckpointError: no run is there, it has not finished, or its files are damaged.
        ConfigError: its data has no test part, it names code and `trust` was not given, or it was started from Python with a model
            or data of its own.
    """
    path = Path(run)
    with file_system_faults(path), RunDirectory.open(path, to_read=True) as rundir, worker_threads() as threads:
        finished = open_finished(rundir)
        config, state = finished.config, finished.state
        check_trust(config, {}, path, trust=trust, again=False)
        inputs = without_weights(named_inputs(config))
        if "test" not in inputs[2]:
            raise ConfigError(f"data {config.data} has no test part to evaluate {path} on")
        warm_up_profiler()
        with reading(config, inputs) as inputs, open_workload(config, inputs) as (device, workload):
            check_same_data(state, workload, path)
            check_plan(state, workload, path)
            device.enforce()
            plan = Plan.from_json(state.plan)
            rundir.clear()
            with rundir.scratch() as folder:
                session = Session(device, rundir, threads, scratch=folder)
                weights = build_weights(workload, plan, folder / "weights", session.counter, trained=path / "model.safetensors")
                return with_prefix("test", score(Run(session, workload, plan, weights, state)))


def export(run: str | Path, *, exit: str | int = "auto", out: str | Path | None = None, trust: bool = False) -> dict[str, Any]:
    """Write the model of a finished run, up to one of its exits, for plain PyTorch.

    Args:
        run: the run's folder, which need not be writable if `out` is given.
        exit: the number of an exit, from 1, the whole model's being the last; "auto" takes the one that the run has chosen.
        out: folder for `model.pt2` (a `torch.export` program of any batch size, in eval mode) and `model.safetensors`; None takes
            `RUN/exit-K`. Files that an earlier export wrote there are replaced, others are not.
        trust: run code that the run names for its model or data (`file.py:factory`).

    Returns:
        `exit`, `layer`, `params`, `val_accuracy`, and the files `program` and `weights`.

    Raises:
        CheckpointError: no run is there, it has not finished, or its files are damaged.
        ConfigError: it has no such exit, `out` holds something else than an export, the run names code and `trust` was not given,
            or it was started from Python with a model or data of its own.
        DiskError: the disk is full, or not writable.
    """
    path = Path(run)
    with file_system_faults(path), RunDirectory.open(path, to_read=True) as rundir:
        finished = open_finished(rundir)
        number = find_exit(finished.result, exit, path)
        folder = ExportFolder.find(path, number, finished.result, None if out is None else Path(out))
        check_trust(finished.config, {}, path, trust=trust, again=False)
        rundir.clear()
        workload = make_workload(finished.config, *without_weights(named_inputs(finished.config)), torch.device("cpu"))
        return export_exit(workload, finished.result, number, path, folder)


def load_weights(model: torch.nn.Module, file: str | Path) -> torch.nn.Module:
    """Load trained weights into a model of the same class.

    It is `model.load_state_dict(safetensors.torch.load_file(file), strict=True)`, for models too that ask for the versions of their
    modules (torchvision's MNASNet), which `load_file` does not give.

    Args:
        model: the model, which is changed.
        file: `model.safetensors` of a run, or a file like it.

    Returns:
        The same model.

    Raises:
        CheckpointError: the file cannot be read, or is not of such a model.
    """
    try:
        with safe_open(file, framework="pt") as source:
            state = OrderedDict((name, source.get_tensor(name)) for name in source.keys())  # noqa: SIM118 - it is no mapping
            versions = (source.metadata() or {}).get(VERSIONS_KEY)
        if versions:
            state._metadata = json.loads(versions)  # type: ignore[attr-defined]
        model.load_state_dict(state, strict=True)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be loaded into {type(model).__name__}: {one_line(error)}") from error
    return model


def plan_run(config: FitConfig, *, timing: bool = True) -> PlanReport:
    """Return the plan of a run whose model and data have names.

    Args:
        config: options of the run.
        timing: time layers, and show all methods side by side.
    """
    return _plan(config, named_inputs, timing)


def _names(model: Model, train: Any, loss: str | OwnLoss) -> dict[str, str]:
    """Return what a run's configuration calls model and data, and the loss where it was given."""
    names = {"model": name_of(model), "data": train if isinstance(train, str) else f"python:{type(train).__name__}"}
    if isinstance(loss, str):
        return names if loss == "auto" else {**names, "loss": loss}
    return {**names, "loss": f"python:{getattr(loss, '__name__', type(loss).__name__)}"}


def _given(train: Any, val: Any, test: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run, with those that a data loader stands for, and parts of the data that are named."""
    named = {f"{name}_data": part for name, part in (("val", val), ("test", test)) if part is not None}
    for name, part in named.items():
        if options.get(name) is not None:
            raise ConfigError(f"{name.removesuffix('_data')} and {name} both name a part of the data; give one")
        if not isinstance(part, str):
            named[name] = None
    return {**loader_options(train), **named, **{name: value for name, value in options.items() if value is not None}}


def _named_weights(weights: Any) -> Any:
    """Return what a run's configuration calls pretrained weights."""
    return f"python:{type(weights).__name__}" if isinstance(weights, Mapping) else weights


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

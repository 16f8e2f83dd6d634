"""Evaluation: the scores of a finished run's weights, on the test part of its own data, or on data that are given."""

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

from lowmem_pnn.config.code import DATA_FIELDS, python_objects
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import check_trust
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.inference.load import form_of, given_model
from lowmem_pnn.inference.opened_run import opened_run
from lowmem_pnn.inference.other_machine import options_here
from lowmem_pnn.inference.samples import open_samples
from lowmem_pnn.inference.smaller_budget import within
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.reporting.progress import Display, default_display
from lowmem_pnn.run.finished import FinishedRun
from lowmem_pnn.run.resume import check_metrics, check_plan, check_same_data
from lowmem_pnn.run.run import Run
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.state import State
from lowmem_pnn.sources.dataset import TASK_OF
from lowmem_pnn.sources.targets import TargetOptions
from lowmem_pnn.tasks import Own
from lowmem_pnn.tasks.scores import with_prefix
from lowmem_pnn.training.initial_weights import build_weights
from lowmem_pnn.training.lifecycle import finite_scores, score
from lowmem_pnn.training.setup import open_workload, reading, warm_up_profiler
from lowmem_pnn.workload import Workload
from lowmem_pnn.workload.inputs import Inputs, Model, python_inputs, without_weights
from lowmem_pnn.workload.trained import trained_inputs, trained_source, with_first_values


def evaluate_run(
    path: Path,
    data: Any,
    *,
    model: Model | None,
    own: Own,
    max_gpu_mem: str | int | None = None,
    device: str | None = None,
    skip_broken: bool = False,
    trust: bool,
    display: Display | None = None,
) -> dict[str, Any]:
    """Measure a finished run's weights; arguments are those of `lowmem_pnn.evaluate`, with loss and metrics as `own`."""
    if skip_broken and data is None:
        raise ConfigError("--skip-broken is for data that is given (--data NAME): the run's own is read as it was; leave it out")
    display = default_display(None) if display is None else display
    with closing(display), opened_run(path) as (rundir, threads, finished):
        finished = dataclasses.replace(finished, config=options_here(finished.config, max_gpu_mem, device))
        config, state, model = finished.config, finished.state, given_model(path, model)
        named = {**({} if model is None else {"model": config.model}), **({} if own.loss is None else {"loss": config.loss})}
        if data is not None:
            named |= {"data": config.data, "val_data": "", "test_data": ""}
        check_trust(config, named, path, trust=trust, again=False)
        if config.loss.startswith("python:") and own.loss is None:
            raise ConfigError(
                f"this run was started from Python with its own loss ({config.loss}), which no name leads to; give it again, from Python: "
                f"lowmem_pnn.evaluate({str(path)!r}, loss=...)"
            )
        config, inputs = (
            (config, _own(config, path, model, own))
            if data is None
            else _given(finished, path, data, model, own, skip_broken=skip_broken, display=display)
        )
        planned = Plan.from_json(state.plan)
        check_metrics(state, own.metrics, path)
        if max_gpu_mem is not None:
            config = with_first_values(config)
        # What was watched in training may be a metric that is not given here.
        config = dataclasses.replace(
            config, early_stop=None, keep_weights="last", loss_chunk=config.loss_chunk if planned.loss_chunk else None
        )
        warm_up_profiler()
        with reading(config, inputs) as inputs, open_workload(config, inputs) as (opened_device, workload):
            if data is not None:
                _check_width(inputs.splits["test"], workload)
            else:
                check_same_data(state, workload, path)
            check_plan(state, workload, path)
            plan = within(planned, workload, opened_device.budget_bytes)
            if plan.spans != planned.spans:
                state = State.trained(workload, plan, state.module_state)
            opened_device.enforce()
            rundir.clear()
            with rundir.scratch() as folder:
                session = Session(opened_device, rundir, threads, display, scratch=folder)
                trained = path / "model.safetensors"
                weights = build_weights(
                    workload, plan, folder / "weights", session.counter, trained, metered=opened_device.metered
                )
                measured = score(Run(session, workload, plan, weights, state))
                return with_prefix("test", finite_scores(measured, "test", display))


def _own(config: FitConfig, path: Path, model: Model | None, own: Own) -> Inputs:
    """Open the run's own data, and its model."""
    call = f"lowmem_pnn.evaluate({str(path)!r}"
    if objects := python_objects(vars(config), DATA_FIELDS):
        raise ConfigError(
            f"the run was trained on data from Python ({', '.join(objects)}), which no name leads to; give data with targets, from Python: "
            f"{call}, data)"
        )
    if model is None:
        trained_source(config, None, None, call)
    opened = python_inputs(config.model if model is None else model, config.data, None, None, loss=own.loss, metrics=own.metrics)
    inputs = without_weights(opened(config))
    if "test" not in inputs.splits:
        raise ConfigError(
            f"data {config.data} has no test part to evaluate {path} on; give other data with targets (--data NAME)"
        )
    return inputs


def _given(
    finished: FinishedRun, path: Path, data: Any, model: Model | None, own: Own, *, skip_broken: bool, display: Display
) -> tuple[FitConfig, Inputs]:
    """Open data that are given, as the run has shown samples to its model."""
    config, form = finished.config, form_of(finished, path)
    source = trained_source(config, model, form.targets.num_classes, f"lowmem_pnn.evaluate({str(path)!r}, data")
    options = TargetOptions(TASK_OF[form.targets.kind], config.ignore_index)
    prepared_by = finished.result.preparation
    opened = open_samples(data, None, config, form, source, prepared_by, options, skip_broken=skip_broken, scored=True)
    if not opened.split.labelled:
        why = "".join(f" ({note})" for note in opened.split.notes)
        raise DataError(f"{opened.words}, have no targets to evaluate {path} on{why}; give samples and targets, or predict them")
    opened.tell(display, finished.result)
    weights = (form.class_weights or None) if config.class_weights == "balanced" else config.class_weights
    config, inputs = trained_inputs(config, form, source, opened.split, opened.split.targets)
    # A loss of the user's own is tried on samples first.
    inputs = inputs._replace(splits={**inputs.splits, "train": opened.split}, own=own)
    return dataclasses.replace(config, class_weights=weights), inputs


def _check_width(samples: Any, workload: Workload) -> None:
    """Refuse labels of tokens that the model has no score for: it may know more tokens than the training data showed, and no others."""
    scores = workload.chain.boundaries[-1][workload.task.output]
    if workload.dataset.targets.kind == "tokens" and samples.num_classes > scores.shape[-1]:
        raise DataError(
            f"the data to evaluate has token {samples.num_classes - 1:,}, and the model scores {scores.shape[-1]:,}, from 0; give data of its "
            "tokens"
        )

"""The trained model of a run, built anew whatever its source; and models that this process has trained, which no name leads to."""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lowmem_pnn.adapters.prepared_model import prepared
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import check_trust
from lowmem_pnn.errors import CheckpointError, ConfigError, LowMemError
from lowmem_pnn.model.python_state import write_by_name
from lowmem_pnn.pretrained.model_file import kept_in_fp32, load_into
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.finished import FinishedRun, open_finished
from lowmem_pnn.seeds import seeded
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.stores.disk import file_system_faults
from lowmem_pnn.stores.journal import DAMAGED
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.workload import Workload, make_workload
from lowmem_pnn.workload.data_form import DataForm
from lowmem_pnn.workload.inputs import Model, named_inputs, without_weights
from lowmem_pnn.workload.trained import trained_source, trained_workload
from lowmem_pnn.zoo.model_source import ModelSource

# Models that runs of this process were started with, by the run's folder.
_GIVEN: dict[Path, Callable[[], Model | None]] = {}


def remember(folder: str | Path, model: Model, *, weakly: bool = False) -> None:
    """Remember the model that a run of this process was started with, so that it need not be given again.

    A module is remembered as long as its owner keeps it.

    Args:
        folder: folder of the run.
        model: as `fit` takes it.
        weakly: whether a function too is remembered as long as its owner keeps it, and no longer.
    """
    if isinstance(model, nn.Module) or (weakly and not isinstance(model, str)):
        _GIVEN[Path(folder).absolute()] = weakref.ref(model)
    elif not isinstance(model, str):
        _GIVEN[Path(folder).absolute()] = lambda: model


def given_model(folder: Path, model: Model | None) -> Model | None:
    """Return the model that was given now, or else that the run was started with in this process; None where there is neither.

    Args:
        folder: folder of the run.
        model: what was given.
    """
    if model is not None:
        return model
    known = _GIVEN.get(folder.absolute(), lambda: None)()
    # The user's own stays as it is.
    return (lambda: copy.deepcopy(known)) if isinstance(known, nn.Module) else known


def folder_of(run: str | Path | Result) -> Path:
    """Return the folder of a run.

    Args:
        run: the folder, or the run's result.
    """
    return Path(run.workdir if isinstance(run, Result) else run)


def load_run(path: Path, model: Model | None, *, trust: bool = False) -> nn.Module:
    """Build a run's model, and load the trained weights; arguments are those of `lowmem_pnn.load`."""
    with file_system_faults(path), RunDirectory.open(path, to_read=True) as rundir:
        finished = open_finished(rundir)
        config, result = finished.config, finished.result
        if result.form:
            check_trust(config, {**_without_data(config), **_named(config, model)}, path, trust=trust, again=False)
            classes = form_of(finished, path).targets.num_classes
            source = trained_source(config, model, classes, f"lowmem_pnn.load({str(path)!r}")
        else:
            check_trust(config, {}, path, trust=trust, again=False)
            source = named_inputs(config)[0]
        with seeded(config.seed):
            built = model if isinstance(model, nn.Module) else _build(source)
            if config.lora is not None or {config.frozen_form, config.weights_dtype} != {"fp32"}:
                built = prepared(built, config, unstored=kept_in_fp32(path / "model.safetensors"))
        load_into(built, path / "model.safetensors")
    write_by_name(built, result.module_state)
    return built.eval()


def form_of(finished: FinishedRun, path: Path) -> DataForm:
    """Return the form of a run's samples and targets.

    Args:
        finished: the run.
        path: folder of the run, for messages.

    Raises:
        ConfigError: its result does not say it.
        CheckpointError: what it says is no form.
    """
    kept = finished.result.form
    if not kept:
        raise ConfigError(
            f"the run in {path} does not say what its samples are like: it is of an earlier version, or samples are of a class of your own; "
            "load its weights into your model by lowmem_pnn.load_weights"
        )
    try:
        return DataForm.from_dict(kept)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path / 'result.json'} cannot be read: its form is none; {DAMAGED}") from error


def workload_of(finished: FinishedRun, path: Path, model: Model | None, *, trust: bool) -> Workload:
    """Return the workload of a finished run, to be exported: without its data, where its result says what that is like.

    Args:
        finished: the run.
        path: folder of the run.
        model: what builds the model, where it was given now.
        trust: run code that the run names.
    """
    config, kept = finished.config, finished.result.form
    if not kept:
        check_trust(config, {}, path, trust=trust, again=False)
        return make_workload(config, *without_weights(named_inputs(config)), torch.device("cpu"))
    check_trust(config, {**_without_data(config), **_named(config, model)}, path, trust=trust, again=False)
    form = form_of(finished, path)
    source = trained_source(config, model, form.targets.num_classes, f"lowmem_pnn.export({str(path)!r}")
    return trained_workload(config, form, source)


def _without_data(config: FitConfig) -> dict[str, str]:
    """Return names of code that is not run where nothing but the model is built."""
    return {"loss": config.loss, "data": config.data, "val_data": "", "test_data": ""}


def _named(config: FitConfig, model: Model | None) -> dict[str, str]:
    return {} if model is None else {"model": config.model}


def _build(source: ModelSource) -> nn.Module:
    try:
        return source.build()
    except (LowMemError, MemoryError):
        raise
    # Whatever a user's constructor raises is the user's to see, on one line, with the original as the cause.
    except Exception as error:
        raise ConfigError(f"model {source.spec} cannot be built: {one_line(error)}; see to its constructor") from error

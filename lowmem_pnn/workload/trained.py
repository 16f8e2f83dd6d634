"""The workload of a finished run for what comes after training: its model, cut as it was, and the form of its data without the data."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn.config.configure import given_options
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.workdir import run_name
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks import Own
from lowmem_pnn.workload.assembly import make_workload
from lowmem_pnn.workload.data_form import DataForm
from lowmem_pnn.workload.inputs import Inputs, Model
from lowmem_pnn.workload.workload import Workload
from lowmem_pnn.zoo.model_source import ModelSource
from lowmem_pnn.zoo.models import find_model


def trained_source(config: FitConfig, model: Model | None, num_classes: int | None, call: str) -> ModelSource:
    """Return the constructor of a trained model.

    Args:
        config: options of the run.
        model: what builds the model, where it was given now; None for what the options name.
        num_classes: number of classes that the run's data has.
        call: what to write where the model is missing, up to its argument.

    Raises:
        ConfigError: the run was started from Python with a model of its own, and none was given; or there is no such model.
    """
    # A path is stored in full.
    if isinstance(model, str) and given_options({"model": model})["model"] != config.model:
        return find_model(model, {}, num_classes, config.task)
    if model is not None and not isinstance(model, str):
        build = (lambda: model) if isinstance(model, nn.Module) else model
        return ModelSource(name=run_name(config), spec=config.model, build=build, input_form="any")
    if config.model.startswith("python:"):
        raise ConfigError(
            f"this run was started from Python with its own model ({config.model}), which no name leads to; give it again, from Python: "
            f"{call}, model=...)"
        )
    weights = config.weights if config.has_weights else None
    return find_model(config.model, config.model_arg, num_classes, config.task, weights)


def trained_inputs(
    config: FitConfig, form: DataForm, source: ModelSource, split: Split | None = None, targets: Targets | None = None
) -> tuple[FitConfig, Inputs]:
    """Return model and data of a finished run for `make_workload`, and the options without those of its training data.

    Args:
        config: options of the run.
        form: form of its data.
        source: constructor of the model.
        split: samples for the model; None where there are none.
        targets: form of their targets; None for that of the run's.
    """
    dataset = form.dataset(config.data, targets)
    own = Own(_no_loss) if form.targets.kind == "own" else Own()
    parts: dict[Any, Split] = {"train": dataset.train}
    if split is not None:
        parts["test"] = split
    # These look at samples that are not there, or wait for a part to validate on.
    config = dataclasses.replace(
        with_first_values(config),
        class_weights=None,
        early_stop=None,
        keep_weights="last",
        compile=False,
        workers=0,
        recovery_epochs=0,
        mixup=None,
        cutmix=None,
        max_steps=None,
        drop_last=False,
        eval_every=None,
    )
    return config, Inputs(source, dataset, parts, own)


def with_first_values(config: FitConfig) -> FitConfig:
    """Return options with one value where there may be one per partition: what comes after training may cut the model again.

    Args:
        config: options of the run.
    """
    lists = ("epochs", "batch_size", "optimizer", "lr", "shuffle", "kappa")
    return dataclasses.replace(config, **{name: getattr(config, name)[:1] for name in lists if getattr(config, name) != "auto"})


def trained_workload(config: FitConfig, form: DataForm, source: ModelSource) -> Workload:
    """Return the workload of a finished run on the CPU, without samples.

    Args:
        config: options of the run.
        form: form of its data.
        source: constructor of the model.
    """
    config, inputs = trained_inputs(config, form, source)
    return make_workload(config, *inputs, torch.device("cpu"))


def _no_loss(outputs: Any, targets: Any) -> Tensor:
    """Stand for a loss of the user's own, which nobody asks for once the model is trained."""
    return torch.zeros(())

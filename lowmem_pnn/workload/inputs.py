"""Models and data as a caller gives them: by name, or as Python objects."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from lowmem_pnn.config.code import names_code
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.transformers_place import TRANSFORMERS_TASKS
from lowmem_pnn.config.workdir import run_name
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.formats.data_loader import loader_options, without_loader
from lowmem_pnn.methods import SplitName
from lowmem_pnn.pretrained.open_weights import WeightFiles
from lowmem_pnn.pretrained.state_dicts import GivenTensors
from lowmem_pnn.pretrained.transformers_weights import TransformersWeights
from lowmem_pnn.sources.dataset import Dataset, join_parts, options_like
from lowmem_pnn.sources.datasets import make_dataset
from lowmem_pnn.sources.given import without_bunch
from lowmem_pnn.sources.imports import load_factory
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.sources.targets import TargetOptions
from lowmem_pnn.tasks import Own, OwnLoss, OwnMetrics
from lowmem_pnn.workload.parts import matched, open_apart, prepare, split_data, with_part
from lowmem_pnn.workload.sources import SampleForm, open_frame, open_source, resize_of
from lowmem_pnn.zoo.library_models import PretrainedValues
from lowmem_pnn.zoo.model_source import ModelSource
from lowmem_pnn.zoo.models import find_model

Model = str | nn.Module | Callable[[], nn.Module]
"""A name, a model, or a function that builds one."""


class Inputs(NamedTuple):
    """What a run is made from.

    Args:
        source: the model.
        dataset: the data set.
        splits: the parts of the data set, by name.
        own: user-defined loss and metrics.
    """

    source: ModelSource
    dataset: Dataset
    splits: dict[SplitName, Split]
    own: Own


def named_inputs(config: FitConfig) -> Inputs:
    """Open model and data by the names in a run's configuration.

    Args:
        config: options of the run.

    Raises:
        ConfigError: the run was started from Python with objects; or there is no such model or data.
    """
    for name, value in (("model", config.model), ("data", config.data)):
        if value.startswith("python:"):
            raise ConfigError(
                f"this run was started from Python with its own {name} ({value}); go on with it there: lowmem_pnn.fit(..., resume=True)"
            )
    return open_data(config)


def python_inputs(
    model: Model,
    train: Any,
    val: Any,
    test: Any,
    *,
    loss: OwnLoss | None = None,
    metrics: OwnMetrics | None = None,
    state_dict: Mapping[str, Any] | None = None,
) -> Callable[[FitConfig], Inputs]:
    """Return what opens model and data that were given as objects, or by name.

    Args:
        model: as `fit` takes it.
        train: as `fit` takes it.
        val: as `fit` takes it.
        test: as `fit` takes it.
        loss: a loss of the user's own; None for one by name.
        metrics: metrics of the user's own, by name.
        state_dict: weights that training begins with; None for those that the configuration names.
    """
    train, val, test = (without_bunch(part) for part in (train, val, test))

    def open_inputs(config: FitConfig) -> Inputs:
        own = Own(loss or named_loss(config), metrics or {})
        options = target_options(config, own)
        named = _named_model(config, None) if isinstance(model, str) else None
        if named is not None:
            _check(config, named)
        input_form = named.input_form if named is not None else "any"
        apart_names = {"val": f"{config.data} (validation part)", "test": f"{config.data} (test part)"}
        form = SampleForm.of(named, options)
        table = None if isinstance(train, str) else open_frame(train, config, form, f"{config.data} (training part)")
        if isinstance(train, str):
            dataset = open_source(config.data, config, form)
        elif table is not None:
            dataset = table
        else:
            dataset = make_dataset(
                without_loader(train, f"{config.data} (training part)"),
                without_loader(test, apart_names["test"]),
                val=without_loader(val, apart_names["val"]),
                name=config.data,
                input_form=input_form,
                skip_broken=config.skip_broken,
                options=options,
                resize=resize_of(config),
            )
        if isinstance(model, str):
            source = _named_model(config, dataset.num_classes)
        else:
            build = (lambda: model) if isinstance(model, nn.Module) else model
            source = ModelSource(name=run_name(config), spec=config.model, build=build, input_form=input_form)
        dataset, apart = open_apart(config, dataset, form)
        alone = isinstance(train, str) or table is not None
        if not alone and dataset.val is not None:
            apart.setdefault("val", dataset.val)  # which was asked for, whatever the fraction
        given: list[tuple[SplitName, Any]] = [("val", val), ("test", test)] if alone else []
        for name, part in given:
            if part is None:
                continue
            where = apart_names[name]
            form = dataclasses.replace(form, options=options_like(dataset.targets, options))
            other = open_frame(part, config, form, where, dataset.preparation)
            if other is None:
                split = from_torch(
                    without_loader(part, where),
                    input_form=input_form,
                    where=where,
                    skip_broken=config.skip_broken,
                    options=form.options,
                    resize=resize_of(config),
                )
                other = join_parts(where, split, None)
            apart[name] = matched(other.train, other, dataset, where)
            dataset = with_part(dataset, name, other.fingerprint, other.skipped)
        source = _with_weights(source, config, state_dict)
        return Inputs(source, *prepare(*split_data(dataset, config, apart), config, source.image_stats), own)

    return open_inputs


def name_of(model: Model) -> str:
    """Return what a run's configuration calls a model: its own name, or "python:" and the name of its class or function."""
    if isinstance(model, str):
        return model
    return f"python:{model.__class__.__name__ if isinstance(model, nn.Module) else getattr(model, '__name__', 'factory')}"


def name_of_weights(weights: Any) -> Any:
    """Return what a run's configuration calls the pretrained weights that were given."""
    return f"python:{type(weights).__name__}" if isinstance(weights, Mapping) else weights


def with_named_parts(train: Any, val: Any, test: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run that were given, with those that a data loader stands for, and parts of the data that are named.

    Args:
        train: as `fit` takes it.
        val: as `fit` takes it.
        test: as `fit` takes it.
        options: fields of `FitConfig`; None means not given.

    Raises:
        ConfigError: a part of the data is given twice, or an object as an option.
    """
    named = {f"{name}_data": part for name, part in (("val", val), ("test", test)) if part is not None}
    for name in ("val_data", "test_data"):
        if not isinstance(options.get(name), str | None):
            raise ConfigError(f"{name} is the name of a data set; give an object as {name.removesuffix('_data')}=")
    for name, part in named.items():
        if options.get(name) is not None:
            raise ConfigError(f"{name.removesuffix('_data')} and {name} both name a part of the data; give one")
        if not isinstance(part, str):
            named[name] = None
    return {**loader_options(train), **named, **{name: value for name, value in options.items() if value is not None}}


def open_data(config: FitConfig) -> Inputs:
    """Find the model's factory and open the data by name.

    Args:
        config: options of the run.

    Raises:
        ConfigError: no such model, data set, or argument.
        DataError: the data cannot be trained on.
    """
    # The data set says how many classes the model gets; the model how images are to be shown to it, and how long a text.
    named = _named_model(config, None)
    _check(config, named)
    own = Own(named_loss(config))
    form = SampleForm.of(named, target_options(config, own))
    dataset = open_source(config.data, config, form)
    source = _with_weights(_named_model(config, dataset.num_classes), config)
    dataset, apart = open_apart(config, dataset, form)
    return Inputs(source, *prepare(*split_data(dataset, config, apart), config, source.image_stats), own)


def without_weights(inputs: Inputs) -> Inputs:
    """Return model and data without the pretrained weights, which only the beginning of a run reads."""
    return inputs._replace(source=dataclasses.replace(inputs.source, weights=None))


def _named_model(config: FitConfig, num_classes: int | None) -> ModelSource:
    """Find the model that the options name; how images are prepared for its pretrained weights is known where it has these."""
    weights = config.weights if config.has_weights else None
    source = find_model(config.model, config.model_arg, num_classes, config.task, weights)
    return source if config.has_weights else dataclasses.replace(source, image_stats=None)


def _check(config: FitConfig, source: ModelSource) -> None:
    """Refuse, before text is tokenised, rows that a model has no positions for, and a folder that lacks weights of it."""
    if config.weights == "default" and source.transformers is not None:
        TransformersWeights(WeightFiles(config.weights, source), source).check()
    most = source.most_context
    for name, asked in (("--context", config.context), ("--target-context", config.target_context)):
        if most is not None and asked is not None and asked > most:
            raise ConfigError(f"{name} {asked:,}: model {source.spec} has positions for {most:,} tokens; give {most} at most")


def _with_weights(source: ModelSource, config: FitConfig, state_dict: Mapping[str, Any] | None = None) -> ModelSource:
    """Return a model with the pretrained weights that were given, or that the options name, which are not opened yet."""
    if state_dict is not None:
        return dataclasses.replace(source, weights=GivenTensors(state_dict))
    if not config.has_weights:
        return source
    assert config.weights is not None
    values: PretrainedValues = WeightFiles(config.weights, source)
    if source.transformers is not None:
        values = TransformersWeights(values, source)
    return dataclasses.replace(source, weights=values)


def named_loss(config: FitConfig) -> OwnLoss | None:
    """Return the loss that the options name in a user's file; None where they name none.

    Args:
        config: options of the run.

    Raises:
        ConfigError: the run was started from Python with a loss of its own, or there is no such function.
    """
    if config.loss.startswith("python:"):
        raise ConfigError(
            f"this run was started from Python with its own loss ({config.loss}); go on with it there: lowmem_pnn.fit(..., resume=True)"
        )
    if not names_code("loss", config.loss):
        return None
    loss = load_factory(config.loss)
    return loss() if isinstance(loss, type) else loss


def target_options(config: FitConfig, own: Own) -> TargetOptions:
    """Return what is known of the targets before the data is opened.

    Args:
        config: options of the run.
        own: loss of the user's own, which takes any targets.
    """
    if own.loss is not None and config.task not in ("auto", *TRANSFORMERS_TASKS):
        raise ConfigError(f"--task {config.task} chooses a loss, and {config.loss} is one of your own; leave --task out")
    return TargetOptions("own" if own.loss is not None else config.target_task, config.ignore_index)

"""Models and data as a caller gives them: by name, or as Python objects."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lowmem_pnn.config.code import names_code
from lowmem_pnn.config.fit_config import FitConfig, default_of
from lowmem_pnn.config.workdir import run_name
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.methods import SplitName
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.sources.datasets import find_dataset, make_dataset
from lowmem_pnn.sources.imports import load_factory
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.models import ModelSource, find_model
from lowmem_pnn.sources.splits import SampleSplit, Split
from lowmem_pnn.sources.subsets import sample_of, train_val_split
from lowmem_pnn.sources.targets import TargetOptions
from lowmem_pnn.tasks import Own, OwnLoss, OwnMetrics

Model = str | nn.Module | Callable[[], nn.Module]
"""A name, a model, or a function that builds one."""

Inputs = tuple[ModelSource, Dataset, dict[SplitName, Split], Own]
"""Model, data set, the parts of the data set by name, and what of loss and metrics is the user's own."""


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
    model: Model, train: Any, val: Any, test: Any, loss: OwnLoss | None = None, metrics: OwnMetrics | None = None
) -> Callable[[FitConfig], Inputs]:
    """Return what opens model and data that were given as objects, or by name.

    Args:
        model: as `fit` takes it.
        train: as `fit` takes it.
        val: as `fit` takes it.
        test: as `fit` takes it.
        loss: a loss of the user's own; None for one by name.
        metrics: metrics of the user's own, by name.
    """

    def open_inputs(config: FitConfig) -> Inputs:
        own = Own(loss or named_loss(config), metrics or {})
        options = target_options(config, own)
        named = find_model(model, config.model_arg, None) if isinstance(model, str) else None
        input_form = named.input_form if named is not None else "any"
        if isinstance(train, str):
            context = named.context if named is not None else None
            dataset = find_dataset(
                train, config.data_root, input_form, context=context, skip_broken=config.skip_broken, options=options
            )
        else:
            dataset = make_dataset(
                train, test, name=config.data, input_form=input_form, skip_broken=config.skip_broken, options=options
            )
        if isinstance(model, str):
            source = find_model(model, config.model_arg, dataset.num_classes)
        else:
            build = (lambda: model) if isinstance(model, nn.Module) else model
            source = ModelSource(name=run_name(config), spec=config.model, build=build, input_form=input_form)
        apart: dict[SplitName, SampleSplit] = {}
        given: list[tuple[SplitName, Any]] = [("val", val), ("test", test if isinstance(train, str) else None)]
        for name, part in given:
            if part is not None:
                apart[name] = from_torch(
                    part,
                    num_classes=dataset.num_classes,
                    input_form=input_form,
                    where=f"{config.data} ({'validation' if name == 'val' else 'test'} part)",
                    skip_broken=config.skip_broken,
                    options=options,
                )
        splits = split_data(dataset, config, apart)
        if apart:
            # Parts that were given apart from the data set belong to the run's data too.
            prints = [dataset.fingerprint, *(part.fingerprint() for part in apart.values())]
            skipped = {name: why for part in apart.values() for name, why in part.skipped.items()}
            dataset = dataclasses.replace(
                dataset,
                fingerprint=hashlib.sha256("".join(prints).encode()).hexdigest(),
                skipped={**dataset.skipped, **skipped},
            )
        return source, dataset, splits, own

    return open_inputs


def name_of(model: Model) -> str:
    """Return what a run's configuration calls a model: its own name, or "python:" and the name of its class or function."""
    if isinstance(model, str):
        return model
    return f"python:{model.__class__.__name__ if isinstance(model, nn.Module) else getattr(model, '__name__', 'factory')}"


def open_data(config: FitConfig) -> Inputs:
    """Find the model's factory and open the data by name.

    Args:
        config: options of the run.

    Raises:
        ConfigError: no such model, data set, or argument.
        DataError: the data cannot be trained on.
    """
    # The data set says how many classes the model gets; the model how images are to be shown to it, and how long a text.
    named = find_model(config.model, config.model_arg, None)
    own = Own(named_loss(config))
    dataset = find_dataset(
        config.data,
        config.data_root,
        named.input_form,
        context=named.context,
        skip_broken=config.skip_broken,
        options=target_options(config, own),
    )
    source = find_model(config.model, config.model_arg, dataset.num_classes)
    return source, dataset, split_data(dataset, config), own


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
    if own.loss is not None and config.task != "auto":
        raise ConfigError(f"--task {config.task} chooses a loss, and {config.loss} is one of your own; leave --task out")
    return TargetOptions("own" if own.loss is not None else config.task, config.ignore_index)


def split_data(dataset: Dataset, config: FitConfig, apart: Mapping[SplitName, Split] | None = None) -> dict[SplitName, Split]:
    """Split a data set into training, validation and test parts.

    Args:
        dataset: open data set.
        config: options of the run.
        apart: parts that are given apart from the data set, and take the place of its own.

    Raises:
        ConfigError: an option for a part that is not there.
    """
    parts = {"val": dataset.val, "test": dataset.test, **(apart or {})}
    fraction = config.val_fraction
    if parts["val"] is not None:
        if fraction not in (0, default_of("val_fraction")):
            raise ConfigError(
                f"--val-fraction {fraction:g} has no effect here: data {config.data} has a validation part of {len(parts['val']):,} "
                "samples; leave the option out, or give 0 to validate on nothing"
            )
        if fraction == 0 and "val" not in (apart or {}):
            parts["val"] = None
        fraction = 0.0
    train, val = train_val_split(dataset.train, fraction, seed_of(config.seed, "split"), config.train_limit)
    splits: dict[SplitName, Split] = {"train": train}
    if (val := parts["val"] or val) is not None:
        splits["val"] = val
    if parts["test"] is not None:
        splits["test"] = sample_of(parts["test"], config.test_limit, seed_of(config.seed, "test"))
    elif config.test_limit is not None:
        raise ConfigError(f"--test-limit has no effect here: data {config.data} has no test part; leave it out")
    return splits

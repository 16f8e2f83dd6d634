"""Models and data as a caller gives them: by name, or as Python objects."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.workdir import run_name
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.methods import SplitName
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.sources.datasets import Dataset, find_dataset, make_dataset
from lowmem_pnn.sources.models import ModelSource, find_model
from lowmem_pnn.sources.splits import SampleSplit, Split, from_torch
from lowmem_pnn.sources.subsets import subset, train_val_split

Model = str | nn.Module | Callable[[], nn.Module]
"""A name, a model, or a function that builds one."""

Inputs = tuple[ModelSource, Dataset, dict[SplitName, Split]]
"""Model, data set, and the parts of the data set by name."""


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


def python_inputs(model: Model, train: Any, val: Any, test: Any) -> Callable[[FitConfig], Inputs]:
    """Return what opens model and data that were given as objects, or by name.

    Args:
        model: as `fit` takes it.
        train: as `fit` takes it.
        val: as `fit` takes it.
        test: as `fit` takes it.
    """

    def open_inputs(config: FitConfig) -> Inputs:
        named = find_model(model, config.model_arg, None) if isinstance(model, str) else None
        input_form = named.input_form if named is not None else "any"
        if isinstance(train, str):
            context = named.context if named is not None else None
            dataset = find_dataset(train, config.data_root, input_form, context=context)
        else:
            dataset = make_dataset(train, test, name=config.data, input_form=input_form)
        if isinstance(model, str):
            source = find_model(model, config.model_arg, dataset.num_classes)
        else:
            build = (lambda: model) if isinstance(model, nn.Module) else model
            source = ModelSource(name=run_name(config), spec=config.model, build=build, input_form=input_form)
        splits = split_data(dataset, config if val is None else dataclasses.replace(config, val_fraction=0.0))
        if val is not None:
            splits["val"] = from_torch(val, num_classes=dataset.num_classes, input_form=input_form)
        if test is not None and isinstance(train, str):
            splits["test"] = from_torch(test, num_classes=dataset.num_classes, input_form=input_form)
        parts = [dataset.fingerprint, *(part.fingerprint() for part in splits.values() if isinstance(part, SampleSplit))]
        if len(parts) > 1:
            # Parts that were given apart from the data set belong to the run's data too.
            dataset = dataclasses.replace(dataset, fingerprint=hashlib.sha256("".join(parts).encode()).hexdigest())
        return source, dataset, splits

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
    dataset = find_dataset(config.data, config.data_root, named.input_form, context=named.context)
    source = find_model(config.model, config.model_arg, dataset.num_classes)
    return source, dataset, split_data(dataset, config)


def split_data(dataset: Dataset, config: FitConfig) -> dict[SplitName, Split]:
    """Split a data set into training, validation and test parts.

    Args:
        dataset: open data set.
        config: options of the run.

    Raises:
        ConfigError: an option for a part that is not there.
    """
    train, val = train_val_split(dataset.train, config.val_fraction, seed_of(config.seed, "split"), config.train_limit)
    splits: dict[SplitName, Split] = {"train": train}
    if val is not None:
        splits["val"] = val
    if dataset.test is not None:
        size = min(len(dataset.test), config.test_limit or len(dataset.test))
        splits["test"] = subset(dataset.test, torch.arange(size).numpy())
    elif config.test_limit is not None:
        raise ConfigError(f"--test-limit has no effect here: data {config.data} has no test part; leave it out")
    return splits

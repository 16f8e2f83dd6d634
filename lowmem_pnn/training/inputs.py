"""Models and data as a caller gives them: by name, or as Python objects."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

from torch import nn

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.workdir import run_name
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.sources.datasets import Dataset, find_dataset, from_torch, make_dataset
from lowmem_pnn.sources.models import ModelSource, find_model
from lowmem_pnn.sources.splits import SampleSplit
from lowmem_pnn.workload import open_data, split_data

Model = str | nn.Module | Callable[[], nn.Module]
"""A name, a model, or a function that builds one."""

Inputs = tuple[ModelSource, Dataset, dict[Any, Any]]
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
        wants = named.wants if named is not None else "any"
        if isinstance(train, str):
            context = named.context if named is not None else None
            dataset = find_dataset(train, config.data_root, wants, context=context)
        else:
            dataset = make_dataset(train, test, name=config.data, wants=wants)
        if isinstance(model, str):
            source = find_model(model, config.model_arg, dataset.num_classes)
        else:
            build = (lambda: model) if isinstance(model, nn.Module) else model
            source = ModelSource(name=run_name(config), spec=config.model, build=build, wants=wants)
        splits = split_data(dataset, config if val is None else dataclasses.replace(config, val_fraction=0.0))
        if val is not None:
            splits["val"] = from_torch(val, num_classes=dataset.num_classes, wants=wants)
        if test is not None and isinstance(train, str):
            splits["test"] = from_torch(test, num_classes=dataset.num_classes, wants=wants)
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

"""Models and data as a caller gives them: by name, or as Python objects."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lowmem_pnn.config.fit_config import FitConfig, default_of
from lowmem_pnn.config.workdir import run_name
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.methods import SplitName
from lowmem_pnn.pretrained.open_weights import WeightFiles
from lowmem_pnn.pretrained.state_dicts import GivenTensors
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.sources.datasets import find_dataset, make_dataset
from lowmem_pnn.sources.models import ModelSource, find_model
from lowmem_pnn.sources.splits import SampleSplit, Split, from_torch
from lowmem_pnn.sources.subsets import sample_of, train_val_split

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


def python_inputs(
    model: Model, train: Any, val: Any, test: Any, state_dict: Mapping[str, Any] | None = None
) -> Callable[[FitConfig], Inputs]:
    """Return what opens model and data that were given as objects, or by name.

    Args:
        model: as `fit` takes it.
        train: as `fit` takes it.
        val: as `fit` takes it.
        test: as `fit` takes it.
        state_dict: weights that training begins with; None for those that the configuration names.
    """

    def open_inputs(config: FitConfig) -> Inputs:
        named = _named_model(config, None) if isinstance(model, str) else None
        input_form = named.input_form if named is not None else "any"
        if isinstance(train, str):
            context = named.context if named is not None else None
            dataset = find_dataset(train, config.data_root, input_form, context=context, skip_broken=config.skip_broken)
        else:
            dataset = make_dataset(train, test, name=config.data, input_form=input_form, skip_broken=config.skip_broken)
        if isinstance(model, str):
            source = _named_model(config, dataset.num_classes)
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
        return _with_weights(source, config, state_dict), dataset, splits

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
    named = _named_model(config, None)
    dataset = find_dataset(config.data, config.data_root, named.input_form, context=named.context, skip_broken=config.skip_broken)
    source = _with_weights(_named_model(config, dataset.num_classes), config)
    return source, dataset, split_data(dataset, config)


def without_weights(inputs: Inputs) -> Inputs:
    """Return model and data without the pretrained weights, which only the beginning of a run reads."""
    source, dataset, splits = inputs
    return dataclasses.replace(source, weights=None), dataset, splits


def _named_model(config: FitConfig, num_classes: int | None) -> ModelSource:
    """Find the model that the options name; how images are prepared for its pretrained weights is known where it has these."""
    source = find_model(config.model, config.model_arg, num_classes)
    return source if config.has_weights else dataclasses.replace(source, image_stats=None)


def _with_weights(source: ModelSource, config: FitConfig, state_dict: Mapping[str, Any] | None = None) -> ModelSource:
    """Return a model with the pretrained weights that were given, or that the options name, which are not opened yet."""
    if state_dict is not None:
        return dataclasses.replace(source, weights=GivenTensors(state_dict))
    if not config.has_weights:
        return source
    assert config.weights is not None
    return dataclasses.replace(source, weights=WeightFiles(config.weights, source))


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

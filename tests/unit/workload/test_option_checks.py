"""Checks of what data and the task allow: samples that differ from epoch to epoch, and methods that keep what they have computed of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.methods import make_method
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.workload.option_checks import check_epochs, try_own
from lowmem_pnn.workload.workload import Workload


def workload(options: dict[str, Any], **data: Any) -> Any:
    config = configure(max_gpu_mem="1GB", model="mlp:4-4", data="python:own", **options)
    dataset = SimpleNamespace(**{"name": "own", "is_random": False, "sampler": None, **data})
    made = SimpleNamespace(config=config, method=make_method(config), dataset=dataset)
    made.reads_anew = Workload.reads_anew.fget(made)  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        ({"method": "pnn"}, " (or pnn --parallel-sil)"),
        ({"method": "neuroflux"}, " (or neuroflux --visits interleaved)"),
        ({"method": "incubate", "partitions": 1}, ""),
        ({"method": "pnn", "partitions": 1}, None),
        ({"method": "pnn", "parallel_sil": True}, None),
        ({"method": "neuroflux", "visits": "interleaved"}, None),
        ({"method": "exact"}, None),
        ({"method": "backprop"}, None),
    ],
)
def test_random_transforms_are_refused_where_activations_are_kept(options: dict[str, Any], instead: str | None) -> None:
    check_epochs(workload(options))
    if instead is None:
        check_epochs(workload(options, is_random=True))
        return
    with pytest.raises(ConfigError) as error:
        check_epochs(workload(options, is_random=True))
    assert str(error.value) == (
        f"--method {options['method']}: samples of data own are drawn at random whenever they are read, and activations of them are kept over "
        f"epochs; use --method exact or backprop{instead}, or take random transforms out of the data set (--augment has some)"
    )


@pytest.mark.parametrize(
    "options", [{"method": "pnn", "parallel_sil": True}, {"method": "neuroflux", "visits": "interleaved"}, {"method": "incubate"}]
)
def test_samplers_are_for_ordinary_training(options: dict[str, Any]) -> None:
    sampler = SimpleNamespace(name="WeightedRandomSampler")
    check_epochs(workload({"method": "exact"}, sampler=sampler))
    check_epochs(workload({"method": "backprop"}, sampler=sampler))
    with pytest.raises(ConfigError) as error:
        check_epochs(workload(options, sampler=sampler))
    assert str(error.value) == (
        f"--method {options['method']}: the WeightedRandomSampler of the data loader draws other samples in every epoch, and partitions learn "
        "one after the other; use --method exact or backprop, or give a loader with shuffle=True or False"
    )


@pytest.mark.parametrize(("vocabulary", "tried"), [(10, [4]), (2**23, [2]), (2**24, [])])
def test_metrics_are_tried_on_outputs_of_some_megabytes(vocabulary: int, tried: list[int]) -> None:
    sizes: list[int] = []
    metrics = SimpleNamespace(check_names=lambda names: None, examine=lambda targets, outputs: sizes.append(len(targets)))
    task: Any = SimpleNamespace(metrics=metrics, task_score_names=lambda outputs: ("loss",))
    try_own(task, from_torch((torch.zeros(6, 2), torch.arange(6))), (TensorSpec((vocabulary,), torch.float32),))
    assert sizes == tried

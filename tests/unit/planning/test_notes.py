"""Notes on a plan: what is said of a device whose budget is not known to be a wall, and of samples that are augmented once."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from helpers.gpu_driver import MB, Driver
from helpers.networks import vector
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.config.configure import configure
from lowmem_pnn.device import CpuDevice, CudaDevice
from lowmem_pnn.methods import make_method
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.notes import augmentation_notes, device_notes, metric_notes, micro_batch_notes
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks.own_metrics import GivenMetrics
from lowmem_pnn.workload import Workload


def test_a_context_that_is_only_assumed_is_said() -> None:
    with CudaDevice(2_000 * MB, driver=Driver("no nvml")) as device:
        assert device_notes(device) == [
            "the driver does not tell what this process holds on the device: 600.0 MB are taken for the CUDA context, libraries included"
        ]
    with CudaDevice(2_000 * MB, driver=Driver("no list")) as device:
        assert device_notes(device) == []
    assert device_notes(CpuDevice(100 * MB)) == []


@pytest.mark.parametrize(
    ("options", "partitions", "said"),
    [
        ({"method": "pnn"}, 2, [""]),
        ({"method": "neuroflux"}, 2, [" (--views N: from N augmented copies)"]),
        ({"method": "incubate"}, 3, [" (--views N: from N augmented copies)"]),
        ({"method": "neuroflux"}, 1, []),
        ({"method": "neuroflux", "views": 2}, 2, []),
        ({"method": "neuroflux", "visits": "interleaved"}, 2, []),
        ({"method": "pnn", "parallel_sil": True}, 2, []),
        ({"method": "exact"}, 2, []),
        ({"method": "pnn", "augment": "none"}, 2, []),
    ],
)
def test_samples_that_are_not_augmented_anew_are_said(options: dict[str, Any], partitions: int, said: list[str]) -> None:
    config = configure(max_gpu_mem="1GB", model="mlp:4-4", data="cifar10", **{"augment": "basic", **options})
    workload = cast(Workload, SimpleNamespace(config=config, method=make_method(config)))
    plan = cast(Plan, SimpleNamespace(partitions=[None] * partitions))
    words = "training samples are augmented for partition 1 alone: from the second partition on they are learnt from as they are, in one copy"
    assert augmentation_notes(workload, plan) == [words + more for more in said]


def test_statistics_that_forwards_change_for_every_micro_batch_are_said() -> None:
    norm = nn.InstanceNorm1d(2, track_running_stats=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), norm, nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    chain = capture(model, vector(4))
    workload = cast(Workload, SimpleNamespace(chain=chain, method=SimpleNamespace(sweeps=True), needs_whole_batch=False))
    part = SimpleNamespace(start=0, stop=len(chain.layers), batch=10, micro_batch=4)
    plan = cast(Plan, SimpleNamespace(partitions=[part], sweep_micro_batch=4))
    assert micro_batch_notes(workload, plan) == [
        "forwards change '2.running_mean', '2.running_var' once for each micro-batch of 4 of the 10 samples of a batch, and in plain "
        "PyTorch once for all of them"
    ]


def test_metrics_that_keep_all_answers_are_said() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    of_lists = torchmetrics.AUROC(task="binary", thresholds=None)
    of_fixed_size = torchmetrics.AUROC(task="binary", thresholds=10)

    def said(**metrics: Any) -> list[str]:
        given = GivenMetrics(metrics, Targets("class", 2), lambda tensors: tensors)
        chain = SimpleNamespace(boundaries=[(), (TensorSpec((250,), torch.float32),)])
        splits = {"train": range(4), "val": range(1000), "test": range(2000)}
        return metric_notes(cast(Workload, SimpleNamespace(task=SimpleNamespace(metrics=given), chain=chain, splits=splits)))

    assert said(thresholds=of_fixed_size, own=lambda outputs, targets: (0, 1)) == []
    for metric in (of_lists, torchmetrics.MetricCollection([of_lists])):
        assert said(thresholds=of_fixed_size, all=metric) == [
            "metric 'all' keeps what it needs of all 2,000 samples, 2.0 MB or more that is in no plan: leave room for it, or give one of "
            "fixed size (thresholds=100)"
        ]

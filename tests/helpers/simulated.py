"""Partitions on a simulated device, and whole runs on one, for tests of what a full device undoes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem_pnn
from helpers.plainloops import built
from helpers.tasks import class_objective
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.device import Device, SimulatedDevice
from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.stores.keys import weight_key
from lowmem_pnn.training import setup

ADAM = OptimizerSpec("adam", lr=0.01)


class Values:
    """Reads as a weight file does: the model's values, and zeros for the optimizer's state."""

    def __init__(self, model: nn.Module, spec: OptimizerSpec | None) -> None:
        self._values = {weight_key(name): tensor.detach().clone() for name, tensor in _tensors(model).items()}
        self._spec = spec

    def read(self, name: str) -> Tensor:
        if name in self._values:
            return self._values[name].clone()
        parameter = self._values[weight_key(name.removeprefix("optimizer/").rpartition("/")[0])]
        assert self._spec is not None
        dtype, shape = self._spec.layout(parameter)[name.rpartition("/")[2]]
        return torch.zeros(shape, dtype=dtype)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def chain_of(build: Callable[[], nn.Module], *shape: int) -> Chain:
    with torch.device("meta"):
        model = build()
    return capture(model, TensorSpec(shape, torch.float32))


def resident(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    device: SimulatedDevice,
    pool: ThreadPoolExecutor,
    spec: OptimizerSpec | None = ADAM,
    **options: Any,
) -> ActivePartition:
    """The whole model, loaded on the device, ready to work."""
    chain = chain_of(build, *shape)
    residency = Residency(chain, 0, len(chain.layers), device, spec)
    # In another thread: on the host.
    residency.load(pool.submit(lambda: Values(built(build), spec)).result(), pool)
    defaults: dict[str, Any] = {
        "batch_size": 16,
        "micro_batch": 16,
        "samples_at_once": 16,
        "smallest_micro_batch": 2,
        "learning_rate": lambda step, base=None: ADAM.lr,
    }
    return ActivePartition(
        number=0,
        title="partition 1 of 1",
        residency=residency,
        objective=class_objective(),
        is_last=True,
        **{**defaults, **options},
    )


class Squeeze(Display):
    """Takes memory away from the device when the second epoch begins."""

    def __init__(self, device: SimulatedDevice, capacity: int) -> None:
        self._device = device
        self._capacity = capacity
        self.messages: list[str] = []

    def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
        if epoch == 1:
            self._device.capacity_bytes = self._capacity

    def message(self, text: str) -> None:
        self.messages.append(text)


def train_on(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs train on this device, whatever their configuration says."""
    monkeypatch.setattr(setup, "_device_of", lambda config, rank: device)


def fit_on(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Result:
    """Train on this device, within its budget."""
    train_on(device, monkeypatch)
    return lowmem_pnn.fit(*args, max_gpu_mem=device.budget_bytes, **options)

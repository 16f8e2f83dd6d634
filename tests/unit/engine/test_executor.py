"""The executor and residencies on a simulated device: what a full device undoes, and what it says when nothing fits."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from helpers.simulated import resident
from helpers.small_networks import images, small_conv, vectors
from helpers.tasks import classification
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.engine.executor import Executor
from lowmem_pnn.engine.loaders import DatasetLoader
from lowmem_pnn.errors import BudgetError
from lowmem_pnn.methods import TaskObjective
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.sources.map_split import from_torch


def train(
    capacity: int | None, micro_batch: int, pool: ThreadPoolExecutor, steps: int = 3
) -> tuple[dict[str, Tensor], list[int], SimulatedDevice]:
    """A few batches of the small conv net, stepped after backward; its tensors, micro-batches after each shrink, and the device."""
    shrunk: list[int] = []
    x, y = images(16 * steps)
    with SimulatedDevice(1 << 30, capacity) as device:
        active = resident(small_conv, (3, 8, 8), device, pool, micro_batch=micro_batch, steps_in_backward=False)
        executor = Executor(device, seed=0, on_shrink=lambda active: shrunk.append(active.micro_batch))
        for layer in active.residency.layers:
            layer.module.train()
        for step in range(steps):
            part = slice(16 * step, 16 * step + 16)
            executor.train_batch(active, ((x[part],), y[part]), step)
        tensors = {**active.residency.trainable, **active.residency.buffers}
        found = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        peak = device.peak_bytes
        active.residency.unload()
    assert peak <= device.capacity_bytes
    return found, shrunk, device


def test_a_batch_that_does_not_fit_is_same_as_one_with_smaller_micro_batches(pool: ThreadPoolExecutor) -> None:
    # What each micro-batch needs, to have a capacity between two of them.
    runs = {size: train(None, size, pool) for size in (16, 8, 4)}
    peaks = {size: device.peak_bytes for size, (_, _, device) in runs.items()}
    assert peaks[4] < peaks[8] < peaks[16]
    for capacity, size, shrinks in ((peaks[16], 16, []), (peaks[16] - 1, 8, [8]), (peaks[8] - 1, 4, [8, 4])):
        found, shrunk, _ = train(capacity, 16, pool)
        assert shrunk == shrinks
        expected, none, _ = runs[size]
        assert none == []
        # The running statistics and the count of batches too: each micro-batch once.
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert {int(value) for name, value in found.items() if name.endswith("num_batches_tracked")} == {3 * 16 // size}


def test_when_not_even_the_smallest_micro_batch_fits_the_error_says_what_was_in_use(pool: ThreadPoolExecutor) -> None:
    smallest = train(None, 2, pool)[2].peak_bytes
    with pytest.raises(
        BudgetError,
        match=r"memory ran out for partition 1 of 1 with a micro-batch of 2, the smallest: .* of 1\.07 GB were in use; "
        r"begin a new run with a larger --max-gpu-mem, or more partitions",
    ):
        train(smallest - 1, 16, pool)


def test_a_step_that_does_not_fit_is_a_budget_error(pool: ThreadPoolExecutor) -> None:
    spec = OptimizerSpec("adamw", fused=False)
    batch = ((torch.ones(2, 12),), torch.tensor([0, 1]))
    with SimulatedDevice(1 << 30) as device:
        active = resident(lambda: nn.Linear(12, 4000), (12,), device, pool, spec, micro_batch=2, steps_in_backward=False)
        executor = Executor(device, seed=0)
        executor.train_batch(active, batch, 0)
        # Room for the gradients, and not for the temporaries of the unfused step.
        device.capacity_bytes = device.used_bytes() + 4000 * 13 * 4 + 4000 * 12 * 4 // 2
        with pytest.raises(BudgetError, match="memory ran out for the optimizer's step of partition 1 of 1"):
            executor.train_batch(active, batch, 1)


def test_objective_that_does_not_fit_is_a_budget_error(pool: ThreadPoolExecutor) -> None:
    class Large(TaskObjective):
        def prepare(self, device: torch.device) -> None:
            self.class_vectors = torch.empty(1000)

    with SimulatedDevice(1 << 30) as device:
        active = resident(lambda: nn.Linear(4, 2), (4,), device, pool)
        active.objective = Large(classification(), ())
        device.capacity_bytes = device.used_bytes() + 100
        with pytest.raises(BudgetError, match="memory ran out for the objective of partition 1 of 1"):
            Executor(device, seed=0).prepare(active)


def test_measuring_on_a_full_device_counts_every_sample_once(pool: ThreadPoolExecutor) -> None:
    x, y = images(30)
    loader = DatasetLoader(from_torch((x, y)), 0, pool, permuted=False)
    with SimulatedDevice(1 << 30) as device:
        active = resident(small_conv, (3, 8, 8), device, pool, None, batch_size=16)
        executor = Executor(device, seed=0)
        [expected] = executor.measure(active, loader)
        device.begin_section()
        before = device.used_bytes()
        executor.measure(active, loader)
        device.capacity_bytes = before + (device.section_peak_bytes() - before) // 2
        [found] = executor.measure(active, loader)
        assert active.micro_batch < 16
    assert found.num_samples == expected.num_samples == 30
    assert found.accuracy == expected.accuracy
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_a_loss_that_is_not_finite_is_returned_and_leaves_the_weights(pool: ThreadPoolExecutor) -> None:
    x, y = vectors(32)
    x[20] = 3e38
    with SimulatedDevice(1 << 30) as device:
        active = resident(
            lambda: nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 4)), (12,), device, pool, batch_size=32
        )
        before = {name: tensor.detach().clone() for name, tensor in active.residency.trainable.items()}
        assert not math.isfinite(Executor(device, seed=0).train_batch(active, ((x,), y), 0))
        assert all(torch.equal(tensor, before[name]) for name, tensor in active.residency.trainable.items())

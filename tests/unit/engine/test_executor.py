"""The executor and residencies on a simulated device: what a full device undoes, and what it says when nothing fits."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowmem_pnn
from helpers import networks
from helpers.plainloops import assert_same_weights, built, loaded, train_by_backprop
from helpers.simulated import ADAM, Squeeze, Values, chain_of, fit_on, resident
from helpers.small_networks import images, small_conv, vectors
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.engine.executor import Executor, micro_batches
from lowmem_pnn.engine.loaders import DatasetLoader
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.engine.tally import EpochProgress, Tally
from lowmem_pnn.errors import BudgetError, DivergedError
from lowmem_pnn.methods import Labels
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.sources.splits import from_torch
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.training.initial_weights import partition_layout


def train(
    capacity: int | None, micro_batch: int, pool: ThreadPoolExecutor, steps: int = 3
) -> tuple[dict[str, Tensor], list[int], SimulatedDevice]:
    """A few batches of the small conv net, stepped after backward; its tensors, micro-batches after each shrink, and the device."""
    shrunk: list[int] = []
    x, y = images(16 * steps)
    with SimulatedDevice(1 << 30, capacity) as device:
        stage = resident(small_conv, (3, 8, 8), device, pool, micro_batch=micro_batch, steps_in_backward=False)
        executor = Executor(device, seed=0, on_shrink=lambda stage: shrunk.append(stage.micro_batch))
        for layer in stage.residency.layers:
            layer.module.train()
        for step in range(steps):
            part = slice(16 * step, 16 * step + 16)
            executor.train_batch(stage, ((x[part],), y[part]), step)
        tensors = {**stage.residency.trainable, **stage.residency.buffers}
        found = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        peak = device.peak_bytes
        stage.residency.unload()
    assert peak <= device.capacity_bytes
    return found, shrunk, device


def test_a_batch_that_does_not_fit_is_same_as_one_with_smaller_micro_batches(pool: ThreadPoolExecutor) -> None:
    # What each micro-batch needs, to have a capacity between two of them.
    peaks = {size: train(None, size, pool)[2].peak_bytes for size in (16, 8, 4)}
    assert peaks[4] < peaks[8] < peaks[16]
    for capacity, size, shrinks in ((peaks[16], 16, []), (peaks[16] - 1, 8, [8]), (peaks[8] - 1, 4, [8, 4])):
        found, shrunk, _ = train(capacity, 16, pool)
        assert shrunk == shrinks
        expected, none, _ = train(None, size, pool)
        assert none == []
        # The running statistics and the count of batches too: each micro-batch once.
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert {int(value) for name, value in found.items() if name.endswith("num_batches_tracked")} == {3 * 16 // size}


def test_when_not_even_the_smallest_micro_batch_fits_the_error_says_what_was_in_use(pool: ThreadPoolExecutor) -> None:
    smallest = train(None, 2, pool)[2].peak_bytes
    with pytest.raises(
        BudgetError,
        match=r"memory ran out for partition 1 of 1 with a micro-batch of 2, the smallest: .* of 1\.07 GB were in use; "
        r"give a larger --max-gpu-mem, or more partitions",
    ):
        train(smallest - 1, 16, pool)


def test_a_step_that_does_not_fit_is_a_budget_error(pool: ThreadPoolExecutor) -> None:
    spec = OptimizerSpec("adamw", fused=False)
    batch = ((torch.ones(2, 12),), torch.tensor([0, 1]))
    with SimulatedDevice(1 << 30) as device:
        stage = resident(lambda: nn.Linear(12, 4000), (12,), device, pool, spec, micro_batch=2, steps_in_backward=False)
        executor = Executor(device, seed=0)
        executor.train_batch(stage, batch, 0)
        # Room for the gradients, and not for the temporaries of the unfused step.
        device.capacity_bytes = device.used_bytes() + 4000 * 13 * 4 + 4000 * 12 * 4 // 2
        with pytest.raises(BudgetError, match="memory ran out for the optimizer's step of partition 1 of 1"):
            executor.train_batch(stage, batch, 1)


def test_a_partition_that_cannot_be_loaded_is_a_budget_error_and_leaves_nothing(pool: ThreadPoolExecutor) -> None:
    with SimulatedDevice(1 << 30, 20_000) as device:
        with pytest.raises(
            BudgetError,
            match=r"layers '0' to '3' do not fit with their optimizer state: memory ran out at .* kB of 1\.07 GB; give a larger --max",
        ):
            resident(small_conv, (3, 8, 8), device, pool)
        assert device.used_bytes() == 0


def test_objective_that_does_not_fit_is_a_budget_error(pool: ThreadPoolExecutor) -> None:
    class Large(Labels):
        def prepare(self, device: torch.device) -> None:
            self.codes = torch.empty(1000)

    with SimulatedDevice(1 << 30) as device:
        stage = resident(lambda: nn.Linear(4, 2), (4,), device, pool)
        stage.objective = Large()
        device.capacity_bytes = device.used_bytes() + 100
        with pytest.raises(BudgetError, match="memory ran out for the objective of partition 1 of 1"):
            Executor(device, seed=0).prepare(stage)


def test_measuring_on_a_full_device_counts_every_sample_once(pool: ThreadPoolExecutor) -> None:
    x, y = images(30)
    loader = DatasetLoader(from_torch((x, y)), 0, pool, mix=False)
    with SimulatedDevice(1 << 30) as device:
        stage = resident(small_conv, (3, 8, 8), device, pool, None, batch_size=16)
        executor = Executor(device, seed=0)
        [expected] = executor.measure(stage, loader)
        device.begin_section()
        before = device.used_bytes()
        executor.measure(stage, loader)
        device.capacity_bytes = before + (device.section_peak_bytes() - before) // 2
        [found] = executor.measure(stage, loader)
        assert stage.micro_batch < 16
    assert found.num_samples == expected.num_samples == 30
    assert found.accuracy == expected.accuracy
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_weights(pool: ThreadPoolExecutor) -> None:
    x, y = vectors(32)
    x[20] = 3e38
    loader = DatasetLoader(from_torch((x, y)), 0, pool, mix=False)
    with SimulatedDevice(1 << 30) as device:
        stage = resident(
            lambda: nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 4)), (12,), device, pool, batch_size=32
        )
        before = {name: tensor.detach().clone() for name, tensor in stage.residency.trainable.items()}
        with pytest.raises(DivergedError, match=r"the loss became (nan|inf) in partition 1 of 1, epoch 1, batch 1; .*lower --lr"):
            Executor(device, seed=0).learn_epoch(stage, loader, EpochProgress(), lambda loss: None)
        assert all(torch.equal(tensor, before[name]) for name, tensor in stage.residency.trainable.items())


@pytest.mark.parametrize("total", range(1, 12))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("smallest", [1, 2])
def test_micro_batches_cover_a_batch_in_order(total: int, size: int, smallest: int) -> None:
    parts = micro_batches(total, max(size, smallest), smallest)
    assert [number for part in parts for number in range(part.start, part.stop)] == list(range(total))
    sizes = [part.stop - part.start for part in parts]
    assert min(sizes) >= min(smallest, total)
    assert max(sizes) <= max(size, smallest) + smallest - 1


def test_a_tally_weighs_batches_by_their_samples() -> None:
    tally = Tally()
    tally.add(1.0, 30, 15)
    tally.add(2.0, 10, 9)
    assert (tally.loss, tally.accuracy, tally.num_samples) == (1.25, 0.6, 40)
    assert (Tally().loss, Tally().accuracy) == (0.0, None)


# Whole runs.


def test_a_run_goes_on_with_smaller_micro_batches_when_the_device_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 12, "val_fraction": 0.1, "step_in_backward": False}
    data = images()
    device = SimulatedDevice(1 << 30)
    plain = fit_on(device, monkeypatch, small_conv, data, method="backprop", workdir=tmp_path / "plain", **options)

    device = SimulatedDevice(1 << 30)
    display = Squeeze(device, int(plain.peak_bytes * 0.85))
    result = fit_on(
        device, monkeypatch, small_conv, data, method="backprop", workdir=tmp_path / "run", display=display, **options
    )
    assert result.oom_retries == 1
    assert result.partitions[0]["micro_batch"] == 6
    assert "partition 1 of 1 (0 to 3): out of memory; going on with a micro-batch of 6" in display.messages
    expected = train_by_backprop(small_conv, data, micro_batch_of=lambda step: 12 if step < 3 else 6, **options)
    assert_same_weights(loaded(small_conv, result.weights_file), expected)


def test_a_device_that_is_fuller_than_was_thought_gets_another_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"epochs": 1, "batch_size": 16, "method": "backprop"}
    free = fit_on(SimulatedDevice(8_000_000), monkeypatch, small_conv, images(), workdir=tmp_path / "free", **options)
    assert free.partitions[0]["micro_batch"] == 16
    for share in (0.99, 0.5):
        device = SimulatedDevice(8_000_000, int(free.peak_bytes * share))
        result = fit_on(device, monkeypatch, small_conv, images(), workdir=tmp_path / f"run{share}", **options)
        assert result.peak_bytes <= device.capacity_bytes < free.peak_bytes
        assert result.partitions[0]["micro_batch"] < 16


def test_a_run_that_no_plan_fits_says_so_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match=r"needs .* above the budget of 30\.0 kB; give --max-gpu-mem"):
        fit_on(SimulatedDevice(30_000), monkeypatch, small_conv, images(), workdir=tmp_path / "run", epochs=1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(BudgetError, match=r"above the budget of 400\.0 kB; give --max-gpu-mem"):
        fit_on(SimulatedDevice(400_000, 30_000), monkeypatch, small_conv, images(), workdir=tmp_path / "run", epochs=1)


def test_boundaries_of_several_tensors_train_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, side = networks.FAMILIES["densenet"]
    data = images(24, side, 7)
    chain = chain_of(build, 3, side, side)
    cut = max(range(1, len(chain.layers)), key=lambda number: len(chain.boundaries[number]))
    assert len(chain.boundaries[cut]) > 1
    device = SimulatedDevice(1 << 30)
    result = fit_on(
        device, monkeypatch, build, data, workdir=tmp_path / "run", cuts=str(cut), epochs=(3, 2), batch_size=8, test=data,
        lr=3e-3, kappa=1.0,
    )  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [float(line.split('"train_loss": ')[1].split(",")[0]) for line in lines if "train_loss" in line]
    assert losses[2] < losses[0]
    with torch.no_grad():
        scores = loaded(build, result.weights_file)(data[0])
    assert result.test_accuracy == pytest.approx(float((scores.argmax(1) == data[1]).float().mean()))
    assert all(part["peak_bytes"] <= part["predicted_peak_bytes"] * 1.02 for part in result.partitions), [
        (part["peak_bytes"], part["predicted_peak_bytes"]) for part in result.partitions
    ]


# Residencies.


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)])
        self.layers[1].weight = self.layers[0].weight
        self.layers[1].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](self.layers[1](self.layers[0](x)))


def test_a_residency_comes_and_goes_bit_for_bit(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    chain = chain_of(_Twice, 8)
    layout = partition_layout(chain, chain.layers, ADAM)
    with SimulatedDevice(1 << 30) as device:
        residency = Residency(chain, 0, len(chain.layers), device, ADAM)
        residency.load(Values(built(_Twice), ADAM), pool)
        # Tied weights are one tensor, frozen ones have no optimizer state.
        [tied] = {id(layer.parameters()[name]) for layer in chain.layers for name in layer.parameters() if "bias" not in name
                  and "layers.2" not in name}  # fmt: skip
        assert tied == id(residency.trainable["layers.0.weight"])
        assert "layers.1.bias" not in residency.trainable
        assert not any(key.startswith("optimizer/layers.1.bias") for key in layout)
        for layer in chain.layers:
            layer.module.train()
        chain(torch.randn(4, 8)).square().sum().backward()
        for optimizer in residency.optimizers:
            optimizer.step()
        held = {**residency.trainable, **residency.buffers}
        kept = {name: tensor.detach().clone() for name, tensor in held.items()}
        moments = residency.optimizers[0].state[residency.trainable["layers.0.weight"]]["exp_avg"].clone()
        with TensorFile.create(tmp_path / "weights", layout) as file:
            residency.save(file)
        del held
        residency.unload()
        kept_bytes = sum(tensor.nbytes for tensor in kept.values()) + moments.nbytes
        assert device.used_bytes() == kept_bytes, "memory is given back"
        assert {tensor.device.type for layer in chain.layers for tensor in layer.parameters().values()} == {"meta"}
        assert not residency.optimizers

        with TensorFile.open(tmp_path / "weights") as file:
            residency.load(file, pool)
        again = {**residency.trainable, **residency.buffers}
        assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
        assert residency.optimizers
        state = residency.optimizers[0].state[residency.trainable["layers.0.weight"]]
        assert torch.equal(state["exp_avg"], moments)
        assert float(state["step"]) == 1.0
        assert all(tensor.data_ptr() % 64 == 0 for tensor in again.values())
        residency.unload()


class _Averaged(nn.Module):
    """Keeps a running mean by assigning to its buffer, as many moving averages do."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x + 0 * self.mean


def test_a_buffer_that_a_forward_replaces_is_kept(tmp_path: Path) -> None:
    x, y = torch.rand(64, 8), torch.arange(64) % 3
    build = lambda: nn.Sequential(nn.Linear(8, 8), _Averaged(), nn.Linear(8, 3))  # noqa: E731
    options = {"max_gpu_mem": "100MB", "method": "backprop", "epochs": 1, "batch_size": 32, "val_fraction": 0.0, "device": "cpu"}
    result = lowmem_pnn.fit(build, (x, y), workdir=tmp_path / "run", **options)
    assert load_file(result.weights_file)["1.mean"].abs().sum() > 0


def test_the_callers_random_state_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    lowmem_pnn.fit("mlp:64-8-10", "digits", max_gpu_mem="100MB", epochs=1, train_limit=40, workdir=tmp_path / "run", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_last_step_that_diverges_is_no_result(tmp_path: Path) -> None:
    x, y = torch.rand(32, 8), torch.arange(32) % 3
    options = {"max_gpu_mem": "100MB", "method": "backprop", "epochs": 1, "batch_size": 32, "val_fraction": 0.0, "device": "cpu"}
    with pytest.raises(DivergedError, match=r"the trained model's test loss is (nan|inf); try a lower --lr"):
        lowmem_pnn.fit("mlp:8-8-3", (x, y), test=(x, y), optimizer="sgd", lr=1e38, workdir=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "model.safetensors").exists()

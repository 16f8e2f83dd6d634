"""Benchmark of layers and machine: what is timed and how often; what must stay as it was; within the budget."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.device import CpuDevice
from lowmem_pnn.device.simulated import SimulatedDevice
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.model.precision import Precision
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling import benchmark
from lowmem_pnn.profiling.benchmark import LayerBenchmark
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.profiling.layer_runner import LayerRunner
from lowmem_pnn.profiling.machine_benchmark import time_machine
from lowmem_pnn.profiling.memory_profiler import profile
from lowmem_pnn.profiling.timings import LayerTimings, Seconds


def block(width: int, **dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(**dropout))


def chain_of(*layers: nn.Module, shape: tuple[int, ...] = (16,), precision: Precision | None = None) -> Chain:
    return capture(nn.Sequential(*layers), TensorSpec(shape, torch.float32), precision or Precision())


def profile_of(chain: Chain) -> MemoryProfile:
    return profile(chain, optimizers=[OptimizerSpec("adam")], device=torch.device("cpu"))


def test_equal_layers_are_measured_once_with_the_same_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of(*(block(16) for _ in range(3)), nn.Linear(16, 8))
    by_fingerprint = profile_of(chain)
    monkeypatch.setattr("lowmem_pnn.profiling.memory_profiler.layer_fingerprint", id)
    assert profile_of(chain) == by_fingerprint


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are run, by name."""
    names: list[str] = []
    real = LayerRunner.__init__

    def init(self: LayerRunner, layer: Any, *rest: Any, **more: Any) -> None:
        names.append(layer.name)
        real(self, layer, *rest, **more)

    monkeypatch.setattr(LayerRunner, "__init__", init)
    return names


def test_equal_layers_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of(*(block(16) for _ in range(4)), nn.Linear(16, 8))
    names = counting(monkeypatch)
    with CpuDevice(200_000_000) as device:
        layer_benchmark = LayerBenchmark(device, seconds=5.0)
        layers, share = layer_benchmark.time_layers(chain, profile_of(chain), 16)
        # The first asks for no gradient of its inputs.
        assert sorted(names) == ["0.0", "1.0", "4"]
        assert share == 1
        assert layers[1] == layers[2] == layers[3]
        assert all(one.forward.at(16) > 0 and one.backward.at(16) > 0 and one.emit.at(16) > 0 for one in layers)
        layer_benchmark.time_layers(chain, profile_of(chain), 16)
    assert len(names) == 3


def test_nothing_of_the_model_changes() -> None:
    chain = chain_of(*(block(16, p=0.5) for _ in range(2)), nn.Linear(16, 8))
    chain.layers[0].module.eval()
    chain.layers[1].module.train()
    before = {
        name: tensor.clone() for layer in chain.layers for name, tensor in {**layer.parameters(), **layer.buffers()}.items()
    }
    state = torch.get_rng_state()
    with CpuDevice(200_000_000) as device:
        LayerBenchmark(device).time_layers(chain, profile_of(chain), 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer.module.training for layer in chain.layers[:2]] == [False, True]
    for layer in chain.layers:
        assert all(torch.equal(before[name], tensor) for name, tensor in {**layer.parameters(), **layer.buffers()}.items())
        assert all(parameter.grad is None for parameter in layer.parameters().values())


def test_a_chain_without_values_is_timed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    chain = capture(model, TensorSpec((16,), torch.float32))
    with CpuDevice(200_000_000) as device:
        _, share = LayerBenchmark(device).time_layers(chain, profile_of(chain), 16)
    assert share == 1


@pytest.mark.parametrize("budget", [3_000_000, 6_000_000, 40_000_000])
def test_layers_are_run_within_the_budget(budget: int) -> None:
    chain = chain_of(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(2)), nn.Linear(256, 1024), shape=(64, 256))
    costs = profile_of(chain)
    device = SimulatedDevice(budget, capacity_bytes=1_000_000_000)
    with device:
        _, share = LayerBenchmark(device, seconds=60.0).time_layers(chain, costs, 64)
        time_machine(device, OptimizerSpec("adamw"), Path(), budget // 2)
    assert device.peak_bytes <= budget
    # The last layer's state alone is 4.2 MB; it is estimated from the others.
    assert (share == 1) == (budget > 4_300_000)


def test_what_there_is_no_time_for_is_estimated() -> None:
    chain = chain_of(nn.Linear(16, 32), nn.Linear(32, 512), nn.Linear(512, 16))
    with CpuDevice(200_000_000) as device:
        layer_benchmark = LayerBenchmark(device, seconds=0.0)
        _, share = layer_benchmark.time_layers(chain, profile_of(chain), 16)
        assert share == 0
    costs, timings = profile_of(chain), LayerTimings(*[Seconds(1.0, 2.0)] * 4)
    estimate = benchmark._estimate(1, costs, {2: timings})
    factor = costs.layers[1].forward_macs / costs.layers[2].forward_macs
    assert estimate.forward == Seconds(factor, 2 * factor)


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"channels_last": True}], ids=str)
def test_layers_run_as_they_will_be_run(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, bool]] = []
    real = nn.functional.relu

    def relu(x: Tensor, inplace: bool = False) -> Tensor:
        seen.append((x.dtype, x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()))
        return real(x)

    chain = chain_of(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), shape=(4, 8, 8), precision=Precision(**options))
    costs = profile_of(chain)
    with CpuDevice(200_000_000) as device:
        monkeypatch.setattr(nn.functional, "relu", relu)
        LayerBenchmark(device).time_layers(chain, costs, 16)
    lower = options.get("dtype") == "bf16"
    assert {*seen} == {(torch.bfloat16 if lower else torch.float32, bool(options.get("channels_last")))}


def test_timings_of_the_machine_are_positive_and_nothing_is_left_on_the_drive(tmp_path: Path) -> None:
    for device in (CpuDevice(200_000_000), SimulatedDevice(200_000_000)):
        with device:
            timings = time_machine(device, OptimizerSpec("sgd"), tmp_path, 100_000_000)
        assert all(seconds > 0 for seconds in timings)
        assert not list(tmp_path.iterdir())


def test_the_line_through_two_measurements() -> None:
    assert benchmark._line(2, 3.0, 10, 11.0) == Seconds(1.0, 1.0)
    # Faster than the samples: a straight line would be below zero at the start.
    assert benchmark._line(2, 1.0, 10, 10.0) == Seconds(0.0, 1.0)
    assert benchmark._line(4, 8.0, 4, 8.0) == Seconds(0.0, 2.0)


def test_layers_that_would_take_too_long_run_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of(nn.Linear(16, 512), nn.Linear(512, 512), nn.Linear(512, 16))
    costs, names = profile_of(chain), counting(monkeypatch)
    monkeypatch.setattr(benchmark, "_FEW_MACS", 0)
    with CpuDevice(200_000_000) as device:
        layer_benchmark = LayerBenchmark(device)
        # Of two samples: ten forwards of the middle layer are 5.2 million multiply-accumulates, four of one sample 1 million.
        layer_benchmark.__dict__["_seconds_per_mac"] = benchmark.SECONDS / 3e6
        layers, share = layer_benchmark.time_layers(chain, costs, 2)
        assert names == ["1", "0", "2"]
        assert share == 1
        assert layers[1].forward.fixed == 0
        assert 0 < layers[1].backward_to_weights.per_sample < layers[1].backward.per_sample
        nothing = LayerBenchmark(device)
        nothing.__dict__["_seconds_per_mac"] = 1.0
        layers, share = nothing.time_layers(chain, costs, 2)
    assert share == 0
    assert len(names) == 3
    assert layers[1].forward.at(1) == pytest.approx(costs.layers[1].forward_macs, rel=0.01)

"""MachineTimings: what is timed and how often; what must stay as it was; within the budget."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.device import CpuDevice
from lowmem_pnn.device.simulated import SimulatedDevice
from lowmem_pnn.model.chain import Chain, TensorSpec, capture
from lowmem_pnn.model.fingerprint import layer_fingerprint
from lowmem_pnn.model.precision import Precision
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling import benchmark as rates
from lowmem_pnn.profiling.benchmark import LayerBenchmark, machine
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.profiling.profiler import profile
from lowmem_pnn.profiling.timings import LayerSeconds, Seconds

pytestmark = pytest.mark.usefixtures("imports_are_no_garbage")


def block(width: int, **dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(**dropout))


def chain_of(*layers: nn.Module, shape: tuple[int, ...] = (16,), precision: Precision | None = None) -> Chain:
    return capture(nn.Sequential(*layers), TensorSpec(shape, torch.float32), precision or Precision())


def profile_of(chain: Chain) -> MemoryProfile:
    return profile(chain, optimizers=[OptimizerSpec("adam")], device=torch.device("cpu"))


def kinds(chain: Chain) -> list[int]:
    """For each layer the first one that is alike."""
    known: dict[Any, int] = {}
    return [known.setdefault(layer_fingerprint(layer), number) for number, layer in enumerate(chain.layers)]


class Scaled(nn.Linear):
    """A layer with a setting that no repr shows."""

    def __init__(self, width: int, scale: Any) -> None:
        super().__init__(width, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.scale(x) if callable(self.scale) else self.scale)


# Likeness.


def test_layers_of_like_modules_and_shapes_are_alike() -> None:
    chain = chain_of(*(block(16) for _ in range(3)), nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert kinds(chain) == [0, 0, 0, 3, 4, 4]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (block(16, p=0.1), block(16, p=0.2)),
        (nn.Linear(16, 16), nn.Linear(16, 16, bias=False)),
        (nn.Linear(16, 16), Scaled(16, 1.0)),
        (Scaled(16, 1.0), Scaled(16, 2.0)),
        (Scaled(16, 1.0), Scaled(16, 1)),
        (Scaled(16, lambda x: x), Scaled(16, lambda x: x * x)),
        (nn.Linear(16, 16), nn.Linear(16, 16).requires_grad_(False)),
    ],
)
def test_layers_that_differ_in_any_setting_are_not_alike(one: nn.Module, other: nn.Module) -> None:
    # Something that learns in any case stands before and after.
    chain = chain_of(nn.Linear(8, 16), one, other, nn.Linear(16, 4), shape=(8,))
    assert kinds(chain)[1:3] == [1, 2]


def test_hooks_make_layers_differ() -> None:
    first, second = block(16), block(16)
    second[0].register_forward_hook(lambda module, inputs, output: None)
    assert kinds(chain_of(first, second)) == [0, 1]


def test_a_layer_with_a_head_is_not_like_one_without() -> None:
    chain = chain_of(block(16), block(16))
    first, second = chain.layers
    assert layer_fingerprint(first) == layer_fingerprint(second)
    assert layer_fingerprint(first.with_head(nn.Linear(16, 3), 0)) != layer_fingerprint(second)


def test_likeness_profiles_the_same_as_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of(*(block(16) for _ in range(3)), nn.Linear(16, 8))
    found = profile_of(chain)
    monkeypatch.setattr("lowmem_pnn.profiling.profiler.layer_fingerprint", id)
    assert profile_of(chain) == found


# Timing.


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are run, by name."""
    names: list[str] = []
    real = rates._Runner.__init__

    def init(self: rates._Runner, layer: Any, *rest: Any, **more: Any) -> None:
        names.append(layer.name)
        real(self, layer, *rest, **more)

    monkeypatch.setattr(rates._Runner, "__init__", init)
    return names


def test_layers_that_are_alike_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of(*(block(16) for _ in range(4)), nn.Linear(16, 8))
    names = counting(monkeypatch)
    with CpuDevice(200_000_000) as device:
        bench = LayerBenchmark(device, seconds=5.0)
        layers, share = bench.layers(chain, profile_of(chain), 16)
        # The first asks for no gradient of its inputs.
        assert sorted(names) == ["0.0", "1.0", "4"]
        assert share == 1
        assert layers[1] == layers[2] == layers[3]
        assert all(one.forward.at(16) > 0 and one.backward.at(16) > 0 and one.emit.at(16) > 0 for one in layers)
        bench.layers(chain, profile_of(chain), 16)
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
        LayerBenchmark(device).layers(chain, profile_of(chain), 16)
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
        _, share = LayerBenchmark(device).layers(chain, profile_of(chain), 16)
    assert share == 1


@pytest.mark.parametrize("budget", [3_000_000, 6_000_000, 40_000_000])
def test_layers_are_run_within_the_budget(budget: int) -> None:
    chain = chain_of(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(2)), nn.Linear(256, 1024), shape=(64, 256))
    costs = profile_of(chain)
    device = SimulatedDevice(budget, capacity_bytes=1_000_000_000)
    with device:
        _, share = LayerBenchmark(device, seconds=60.0).layers(chain, costs, 64)
        machine(device, OptimizerSpec("adamw"), Path(), budget // 2)
    assert device.peak_bytes <= budget
    # The last layer's state alone is 4.2 MB; it is estimated from the others.
    assert (share == 1) == (budget > 4_300_000)


def test_what_there_is_no_time_for_is_estimated() -> None:
    chain = chain_of(nn.Linear(16, 32), nn.Linear(32, 512), nn.Linear(512, 16))
    with CpuDevice(200_000_000) as device:
        bench = LayerBenchmark(device, seconds=0.0)
        _, share = bench.layers(chain, profile_of(chain), 16)
        assert share == 0
    costs, found = profile_of(chain), LayerSeconds(*[Seconds(1.0, 2.0)] * 4)
    estimate = rates._estimate(1, costs, {2: found})
    factor = costs.layers[1].forward_macs / costs.layers[2].forward_macs
    assert estimate.forward == Seconds(factor, 2 * factor)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}], ids=str)
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
        LayerBenchmark(device).layers(chain, costs, 16)
    lower = options.get("precision") == "bf16"
    assert {*seen} == {(torch.bfloat16 if lower else torch.float32, bool(options.get("channels_last")))}


def test_rates_of_the_machine_are_positive_and_nothing_is_left_on_the_drive(tmp_path: Path) -> None:
    for device in (CpuDevice(200_000_000), SimulatedDevice(200_000_000)):
        with device:
            found = machine(device, OptimizerSpec("sgd"), tmp_path, 100_000_000)
        assert all(rate > 0 for rate in found)
        assert not list(tmp_path.iterdir())


def test_the_line_through_two_measurements() -> None:
    assert rates._line(2, 3.0, 10, 11.0) == Seconds(1.0, 1.0)
    # Faster than the samples: a straight line would be below zero at the start.
    assert rates._line(2, 1.0, 10, 10.0) == Seconds(0.0, 1.0)
    assert rates._line(4, 8.0, 4, 8.0) == Seconds(0.0, 2.0)

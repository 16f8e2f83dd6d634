"""Mixing of samples: modules that mix those of a batch are found and named, whatever they do; those that do not are left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.plainloops import built
from helpers.small_networks import images, small_conv, small_resnet, vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.model.python_state import Snapshot
from lowmem_pnn.training.mixing import find_mixing
from lowmem_pnn.workload import Workload, make_workload
from lowmem_pnn.workload.inputs import python_inputs


def workload_of(build: Callable[[], nn.Module], data: Any, **options: Any) -> Workload:
    config = configure(max_gpu_mem="400MB", model="python:model", data="python:data", method="exact", batch_size=10, **options)
    return make_workload(config, *python_inputs(build, data, None, None)(config), torch.device("cpu"))


def mixing_of(build: Callable[[], nn.Module], data: Any = None, **options: Any) -> dict[str, int]:
    def say(text: str) -> None:
        raise AssertionError(text)

    return find_mixing(workload_of(build, data or vectors(), **options), built(build), say)


class OwnNorm(nn.Module):
    """Centres over the batch in train mode, and by a running mean in eval mode."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return (x - self.mean) * self.scale
        mean = x.mean(0)
        self.mean.mul_(0.9).add_(mean.detach(), alpha=0.1)
        return (x - mean) * self.scale


class Does(nn.Module):
    """A module that does a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class InTraining(Does):
    """Does it in train mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.training else x


class First(nn.Module):
    """Calls a module, and keeps the first of what it returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *x: Tensor) -> Tensor:
        first: Tensor = self.inner(*x)[0]
        return first


def with_deviation(x: Tensor) -> Tensor:
    """Append the deviation over the batch, as discriminators do."""
    return torch.cat([x, x.std(0, unbiased=False).mean().expand(len(x), 1)], 1)


def chain_of(*modules: nn.Module) -> nn.Module:
    """A network in which each module is at the end of a layer of its own."""
    layers: list[nn.Module] = [nn.Linear(12, 20)]
    for module in modules:
        layers += [module, nn.Linear(21 if module is DEVIATION else 20, 20)]
    return nn.Sequential(*layers)


def tokens(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Linear(4, 8), *modules, nn.Flatten(), nn.Linear(24, 4))


DEVIATION = Does(with_deviation)


def mixers() -> nn.Module:
    return chain_of(
        OwnNorm(),
        DEVIATION,
        nn.Softmax(0),
        nn.Sequential(nn.ReLU(), InTraining(lambda x: x.cumsum(0)), nn.Dropout(0.3)),
        Does(lambda x: x - x[:1]),
        nn.Tanh(),
        Does(lambda x: x - x[-1:]),
        InTraining(lambda x: x + x[torch.randperm(len(x))]),
        Does(lambda x: ((x @ x.T) / 20).softmax(1) @ x),
        Does(lambda x: x / len(x)),  # no row looks at another; but a row alone is another one
        Does(lambda x: x * torch.arange(len(x)).unsqueeze(1)),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_mixes_samples_is_named(precision: str) -> None:
    expected = {"1": 0, "3": 1, "5": 2, "7.1": 3, "9": 4, "13": 6, "15": 7, "17": 8}
    modules = {f"module {name!r}": number for name, number in expected.items()}
    assert mixing_of(mixers, precision=precision) == {**modules, "layer '9'": 9, "layer '10'": 10}


def test_time_in_the_place_of_the_batch_is_found() -> None:
    assert mixing_of(lambda: tokens(First(nn.LSTM(8, 8)))) == {"module '2.inner'": 1}


def decorrelate(x: Tensor) -> Tensor:
    """Divide by the distance between samples, which has to be one."""
    if not (distance := torch.dist(x[0], x[-1])) > 0:
        raise ValueError("no distance")
    return x / distance


def test_what_takes_no_equal_samples_mixes_them() -> None:
    workload, model = workload_of(own_norm, vectors()), built(own_norm)
    workload.bare.layers[0].module.get_submodule("1").register_forward_hook(lambda module, x, output: decorrelate(x[0]))
    assert find_mixing(workload, model, print) == {"layer '0'": 0}


def test_a_layer_that_fails_is_said_and_no_reason_to_stop() -> None:
    said: list[str] = []

    def fail(module: nn.Module, x: Any) -> None:
        raise ValueError("two are\nnot enough")

    workload = workload_of(mixers, vectors())
    workload.bare.layers[1].module.get_submodule("2").register_forward_pre_hook(fail)
    assert find_mixing(workload, built(mixers), said.append) == {"module '1'": 0}
    text = "whether model python:model mixes samples was not found out from layer '1' on, of two samples: ValueError: two are not enough"
    assert said == [text]


class Functional(nn.Module):
    """Normalises over the batch in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(12, 20), nn.Linear(20, 4)
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(20))
        self.register_buffer("var", torch.ones(20))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.batch_norm(self.widen(x), self.mean, self.var, training=self.training)
        scores: Tensor = self.narrow(x)
        return scores


def test_a_function_in_the_models_own_forward_is_named_by_its_layer() -> None:
    assert mixing_of(Functional) == {"layer 'widen'": 0}


def loners() -> nn.Module:
    return chain_of(
        nn.Sequential(nn.LayerNorm(20), nn.Unflatten(1, (4, 5)), nn.GroupNorm(2, 4), nn.Flatten()),
        nn.Sequential(nn.Unflatten(1, (4, 5)), nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.Flatten()),
        nn.Sequential(nn.Dropout(), nn.AlphaDropout(0.2), InTraining(lambda x: nn.functional.dropout(x, 0.3))),
        nn.Sequential(nn.Softmax(1), Does(lambda x: x - x.mean(1, keepdim=True))),
        InTraining(lambda x: x + torch.randn_like(x)),
        nn.BatchNorm1d(20, track_running_stats=False),  # BatchNorm is known
    )


def sequences() -> nn.Module:
    """Attention and recurrence over tokens."""
    return tokens(
        First(nn.LSTM(8, 8, 2, batch_first=True, dropout=0.2)),
        nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True),
        First(nn.GRU(8, 4, batch_first=True, bidirectional=True)),
    )


@pytest.mark.parametrize("build", [loners, sequences])
def test_what_does_not_is_left_alone(build: Callable[[], nn.Module]) -> None:
    assert mixing_of(build) == {}


@pytest.mark.parametrize(("build", "options"), [(small_conv, {"precision": "bf16"}), (small_resnet, {"channels_last": True})])
def test_networks_with_batchnorm_are(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    assert mixing_of(build, images(), **options) == {}


def own_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), OwnNorm(), nn.Linear(20, 4))


def test_equal_samples_tell_nothing_and_are_passed_over() -> None:
    x, y = vectors()
    x[1:4] = x[0]
    assert mixing_of(own_norm, (x, y), val_fraction=0) == {"module '1'": 0}
    x[:] = x[0]
    assert mixing_of(own_norm, (x, y), val_fraction=0) == {}


def test_nothing_is_changed() -> None:
    model, workload = built(own_norm), workload_of(own_norm, vectors())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, random_state = Snapshot(model), torch.get_rng_state()
    find_mixing(workload, model, lambda text: None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not state.changed(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(tensor.is_meta for layer in workload.chain.layers for tensor in layer.parameters().values())
    assert not any(module._forward_hooks for layer in workload.chain.layers for module in layer.module.modules())

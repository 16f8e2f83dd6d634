"""Chains: equal to the model in every mode, with the model's own names, and cut where their docstring says."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from helpers.networks import (
    FromFunction,
    assert_equal,
    build,
    images,
    layer_names,
    mlp,
    run,
    vector,
    with_small_head,
)
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.errors import CaptureError, ConfigError
from lowmem_pnn.model.chain import Chain, TensorSpec

models = torchvision.models


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Blocks of more than an eighth of ResNet-18's weights are opened.
LARGE_BLOCKS = ["layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]


def test_modes_are_switched_like_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)).eval()
    chain = capture(model, vector(4))
    x = torch.randn(3, 4)
    assert torch.equal(chain(x), model(x))  # it starts in the model's mode
    assert chain.train() is chain
    assert torch.equal(run(chain, x), run(model.train(), x))
    assert chain.eval() is chain
    assert torch.equal(chain(x), model.eval()(x))


@pytest.mark.parametrize(
    ("make", "spec", "expected"),
    [
        (lambda: mlp(8, 6, 5, 4), vector(8), ["0", "1", "2"]),
        (lambda: nn.Linear(8, 3), vector(8), ["weight"]),
        (lambda: nn.Sequential(nn.Linear(8, 3)), vector(8), ["0"]),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3), nn.PReLU(), nn.Linear(3, 3)),
            vector(2, 4),
            ["0", "1"],
        ),
        (
            lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(6, 3)),
            vector(8),
            ["0", "1"],
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Softmax(-1)), vector(2, 4), ["0"]),
        (
            lambda: models.resnet18(num_classes=3),
            images(32),
            ["conv1", *(f"layer{n}.{k}" for n in (1, 2, 3) for k in (0, 1)), *LARGE_BLOCKS, "fc"],
        ),
        (
            lambda: with_small_head(lambda: models.vgg11_bn(init_weights=False)),
            images(32),
            [*(f"features.{n}" for n in (0, 4, 8, 11, 15, 18, 22, 25)), *(f"classifier.{n}" for n in (0, 3))],
        ),
        (
            lambda: models.VisionTransformer(32, 8, 2, 4, 16, 32, num_classes=7),
            images(32),
            ["conv_proj", "encoder.pos_embedding", *(f"encoder.layers.encoder_layer_{n}" for n in (0, 1)), "heads.head"],
        ),
        (
            lambda: models.MaxVit((32, 32), 8, 2, [8], [2], 4, 0.2, num_classes=7),
            images(32),
            [
                "stem.0.0",
                "stem.1.0",
                *(
                    f"blocks.0.layers.{n}.layers.{part}"
                    for n in (0, 1)
                    for part in ("MBconv", "window_attention", "grid_attention")
                ),
                "classifier.3",
                "classifier.5",
            ],
        ),
    ],
    ids=["mlp", "linear", "one layer", "prelu", "norm", "no weights", "resnet18", "vgg11_bn", "vit", "maxvit"],
)
def test_layers(make: Callable[[], nn.Module], spec: TensorSpec, expected: list[str]) -> None:
    chain = capture(make(), spec)
    assert layer_names(chain) == expected
    assert chain.boundaries[0] == (spec,)
    assert len(chain.boundaries) == len(expected) + 1


def test_boundaries_of_densenet_are_tuples() -> None:
    model, side = build("densenet")
    chain = capture(model, images(side))
    # A dense layer hands on what it got, and its own features: from one tensor to one more at each cut inside a block.
    widths = {
        layer.name: [spec.shape[0] for spec in before] for layer, before in zip(chain.layers, chain.boundaries, strict=False)
    }
    assert widths["features.denseblock1.denselayer1"] == [16]
    assert widths["features.denseblock1.denselayer2"] == [16, 8]
    assert widths["features.denseblock2.denselayer3"] == [16, 8, 8]
    assert widths["features.transition1.conv"] == [32]


def test_weights_on_meta_are_enough() -> None:
    with torch.device("meta"):
        # 4 TB of weights: only their shapes are looked at.
        model = nn.Sequential(nn.Linear(8, 10**6), nn.BatchNorm1d(10**6), nn.Linear(10**6, 10**6), nn.ReLU(), nn.Linear(10**6, 2))
    chain = capture(model, vector(8))
    assert layer_names(chain) == ["0", "1", "2"]
    assert [specs[0].shape for specs in chain.boundaries] == [(8,), (10**6,), (10**6,), (2,)]
    assert all(tensor.is_meta for layer in chain.layers for tensor in {**layer.parameters(), **layer.buffers()}.values())


def test_model_and_random_state_are_untouched() -> None:
    model, side = build("efficientnet")
    model.train()
    model.features[1].eval()
    next(iter(model.parameters())).grad = torch.ones_like(next(iter(model.parameters())))
    model.features[0].register_forward_hook(lambda *_: None)

    def state() -> list[Any]:
        modules = [
            (name, id(module), module.training, list(vars(module)), len(module._forward_hooks))
            for name, module in model.named_modules()
        ]
        tensors = [(name, id(t), t._version, t.requires_grad) for name, t in [*model.named_parameters(), *model.named_buffers()]]
        generators = [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]
        return [modules, tensors, generators, [id(parameter.grad) for parameter in model.parameters()]]

    before = state()
    chain = capture(model, images(side))
    chain.eval()
    chain.layers[0].set_tensor("features.0.0.weight", torch.zeros_like(model.features[0][0].weight))
    assert state() == before


def test_names_are_the_models_own() -> None:
    model, side = build("vit")
    chain = capture(model, images(side))
    assert chain.persistent == tuple(model.state_dict())
    held = [name for layer in chain.layers for name in {**layer.parameters(), **layer.buffers()}]
    assert held == sorted(model.state_dict(), key=held.index)
    assert sorted(held) == sorted(model.state_dict())
    assert chain.ties == chain.tied_ranges == chain.unused == ()
    for layer in chain.layers:
        order = [chain.persistent.index(name) for name in layer.parameters()]
        assert order == sorted(order)
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for layer in chain.layers for name, parameter in layer.parameters().items())


def test_set_tensor() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    first, _ = capture(model, vector(3)).layers
    given = nn.Parameter(torch.eye(3), requires_grad=False)
    first.set_tensor("0.weight", given)
    first.set_tensor("0.bias", torch.full((3,), 2.0))
    first.set_tensor("1.running_mean", torch.full((3,), -4.0))
    first.module.eval()
    assert first.parameters()["0.weight"] is given
    assert [parameter.requires_grad for parameter in first.parameters().values()] == [False, False, True, True]
    assert torch.allclose(first(torch.ones(1, 3))[0], torch.full((1, 3), 7.0))
    with pytest.raises(KeyError, match=r"layer '0' has no parameter or buffer '2.weight'"):
        first.set_tensor("2.weight", torch.zeros(1, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lstm(x)[0]
        return output


def test_set_tensor_reaches_lists_of_weights() -> None:
    chain = capture(nn.Sequential(Recurrent(), nn.Linear(4, 2)), vector(5, 3))
    for name, parameter in chain.layers[0].parameters().items():
        chain.layers[0].set_tensor(name, torch.zeros_like(parameter))
    assert torch.equal(chain.layers[0](torch.randn(2, 5, 3))[0], torch.zeros(2, 5, 4))


def test_tokens_are_a_valid_input() -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4), nn.Flatten(), nn.Linear(24, 2))
    chain = capture(model, TensorSpec((6,), torch.int64))
    assert layer_names(chain) == ["0", "1", "2"]
    assert chain.boundaries[0] == (TensorSpec((6,), torch.int64),)
    assert chain.boundaries[1] == (vector(6, 4),)
    assert_equal(chain, model, torch.randint(11, (3, 6)))


def test_input_used_later_crosses_the_cuts() -> None:
    model = FromFunction(
        lambda m, x: m.c(torch.cat([m.b(m.a(x)), x], 1)), a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(6, 1)
    )
    chain = capture(model, vector(3))
    assert [len(specs) for specs in chain.boundaries] == [1, 2, 1, 1]
    assert layer_names(chain) == ["a", "b", "c"]
    assert_equal(chain, model, torch.randn(4, 3))


def test_ties_of_names_and_layers() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    model[3].weight = model[0].weight
    chain = capture(model, TensorSpec((5,), torch.int64))
    assert chain.ties == (("0.weight", "3.weight"),)
    assert chain.tied_ranges == ((0, 3),)
    assert [list(layer.parameters()) for layer in chain.layers] == [
        ["0.weight"],
        ["1.weight", "1.bias"],
        ["2.weight", "2.bias"],
        ["3.weight"],
    ]
    assert chain.unused == ()
    assert_equal(chain, model, torch.randint(9, (2, 5)))


def test_layers_that_share_a_tensor_which_a_forward_changes_stay_together() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    model[3].weight, model[2].weight = model[0].weight, model[1].weight
    chain = capture(model, TensorSpec((5,), torch.int64))
    assert (chain.tied_ranges, chain.moving_ranges) == (((0, 3), (1, 2)), ((0, 3),))
    assert chain.written == chain.moving == {"0.weight", "3.weight"}


def test_a_module_that_runs_twice() -> None:
    model = FromFunction(lambda m, x: m.c(m.b(m.norm(m.b(x)))), b=nn.Linear(4, 4), norm=nn.BatchNorm1d(4), c=nn.Linear(4, 2))
    model.alias = model.b
    chain = capture(model, vector(4))
    assert layer_names(chain) == ["b", "b#2", "c"]
    assert chain.tied_ranges == ((0, 1),)
    assert chain.ties == (("b.weight", "alias.weight"), ("b.bias", "alias.bias"))
    assert_equal(chain, model, torch.randn(3, 4))


def test_ties_inside_a_layer_have_all_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4, bias=False)
            self.two = nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    chain = capture(nn.Sequential(Twice(), nn.Linear(4, 20)), vector(4))
    assert list(chain.layers[0].parameters()) == ["0.one.weight", "0.two.weight"]
    assert chain.ties == (("0.one.weight", "0.two.weight"),)
    assert chain.tied_ranges == ()


def test_unused_tensors_are_listed() -> None:
    model = FromFunction(
        lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 2), old=nn.Linear(2, 2).requires_grad_(False)
    )
    model.register_buffer("mean", torch.zeros(4))
    model.register_buffer("scratch", torch.zeros(4), persistent=False)
    chain = capture(model, vector(4))
    assert chain.unused == ("mean", "old.weight", "old.bias", "scratch")
    assert chain.persistent == ("mean", "a.weight", "a.bias", "b.weight", "b.bias", "old.weight", "old.bias")


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(m.a(x)),
        lambda m, x: (m.head(x), m.b(m.a(x)))[1],
        lambda m, x: m.b(m.a(x)) + 0 * m.head.weight.shape[0],
        lambda m, x: m.b(m.a(x)) + m.head(x).detach() + m.head.weight.detach().sum(),
    ],
    ids=["not called", "called for nothing", "only looked at", "detached"],
)
def test_a_trainable_weight_without_use_is_frozen(forward: Callable[[Any, Tensor], Tensor]) -> None:
    head = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    head.weight = nn.Parameter(torch.zeros(3))
    model = FromFunction(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2), head=head)
    chain = capture(model, vector(4))
    assert chain.idle == ("head.weight", "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias")
    learning = {name for layer in chain.layers for name, weight in layer.parameters().items() if weight.requires_grad}
    assert learning == {"a.weight", "a.bias", "b.weight", "b.bias"}
    # The model itself stays as it is, and its BatchNorms see what they saw.
    assert all(parameter.requires_grad for parameter in model.parameters())
    twin, x = copy.deepcopy(model), torch.randn(3, 4)
    assert torch.equal(twin(x), chain(x))
    assert torch.equal(twin.head[0].running_mean, model.head[0].running_mean)


def test_a_model_of_which_nothing_gets_a_gradient_is_refused() -> None:
    model = FromFunction(lambda m, x: x * 2, a=nn.Linear(4, 4))
    with pytest.raises(
        CaptureError, match="no parameter of FromFunction gets a gradient: its output depends on none that learns"
    ):
        capture(model, vector(4))


@pytest.fixture(scope="module")
def resnet18() -> Chain:
    with torch.device("meta"):
        return capture(models.resnet18(), images(32))


def test_layer_index(resnet18: Chain) -> None:
    cuts: list[str | int] = ["conv1", "layer1.1", "layer2", "fc", 3, "3", "0", 9]
    assert [resnet18.layer_index(cut) for cut in cuts] == [0, 2, 3, 11, 3, 3, 0, 9]
    # Digits are numbers, whatever the layers are called.
    assert [capture(mlp(4, 4, 4, 4), vector(4)).layer_index(cut) for cut in ("1", 2)] == [1, 2]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ("layer1.l", "no layer 'layer1.l' in the model; did you mean 'layer1.1'?"),
        ("lyer2", "no layer 'lyer2' in the model; did you mean 'layer2'?"),
        (
            "stem",
            "no layer 'stem' in the model; the layers are conv1, layer1.0, layer1.1, layer2.0, layer2.1, layer3.0, layer3.1, "
            "layer4.0.conv1, layer4.0.conv2, layer4.1.conv1, layer4.1.conv2, fc",
        ),
        ("bn1", "no cut can stand at 'bn1': it is inside layer 0, 'conv1'; cut at a layer's name or number"),
        (
            "layer2.0.conv2",
            "no cut can stand at 'layer2.0.conv2': it is inside layer 3, 'layer2.0'; cut at a layer's name or number",
        ),
        ("12", "no layer 12: the layers are numbered from 0 ('conv1') to 11 ('fc')"),
        (-1, "no layer -1: the layers are numbered from 0 ('conv1') to 11 ('fc')"),
    ],
)
def test_layer_index_of_what_is_no_layer(resnet18: Chain, cut: str | int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resnet18.layer_index(cut)
    assert str(caught.value) == message

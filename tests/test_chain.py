"""Chains: equal to the model in every mode, cut only where a cut is safe, and clear about what cannot be cut."""

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_pnn.chain import Chain, TensorSpec, capture
from lowmem_pnn.errors import CaptureError, ConfigError

models = torchvision.models


def with_small_head(model: nn.Module) -> nn.Module:
    """VGG's and AlexNet's own heads have 4,096 units and most of the weights."""
    [fan_in] = {layer.in_features for layer in model.classifier[:3] if isinstance(layer, nn.Linear)}
    model.classifier = nn.Sequential(nn.Linear(fan_in, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 7))
    return model


# One small member of each family of torchvision's classification networks, and the side of the images it gets.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (lambda: with_small_head(models.alexnet(num_classes=7)), 63),
    "convnext": (
        lambda: models.ConvNeXt(
            [models.convnext.CNBlockConfig(8, 16, 2), models.convnext.CNBlockConfig(16, None, 2)], 0.2, num_classes=7
        ),
        32,
    ),
    "densenet": (lambda: models.DenseNet(8, (2, 3, 2), 16, num_classes=7), 32),
    "efficientnet": (lambda: models.efficientnet_b0(num_classes=7), 32),
    "efficientnet_v2": (lambda: models.efficientnet_v2_s(num_classes=7), 32),
    "googlenet": (lambda: models.googlenet(num_classes=7, aux_logits=False, init_weights=False), 32),
    "inception_v3": (lambda: models.inception_v3(num_classes=7, aux_logits=False, init_weights=False), 75),
    "maxvit": (
        lambda: models.MaxVit(
            input_size=(32, 32), stem_channels=8, partition_size=2, block_channels=[8, 16], block_layers=[2, 2], head_dim=4,
            stochastic_depth_prob=0.2, num_classes=7,
        ),
        32,
    ),
    "mnasnet": (lambda: models.mnasnet0_5(num_classes=7), 32),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=7), 32),
    "mobilenet_v3": (lambda: models.mobilenet_v3_small(num_classes=7), 32),
    "regnet": (lambda: models.regnet_y_400mf(num_classes=7), 32),
    "resnet": (lambda: models.resnet18(num_classes=7), 32),
    "resnext": (lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 2], num_classes=7, groups=4, width_per_group=8), 32),
    "shufflenet_v2": (lambda: models.shufflenet_v2_x0_5(num_classes=7), 32),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=7), 32),
    "swin": (lambda: models.SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.2, num_classes=7), 32),
    "swin_v2": (
        lambda: models.SwinTransformer(
            [2, 2], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.2, num_classes=7,
            block=models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=models.swin_transformer.PatchMergingV2,
        ),
        32,
    ),
    "vgg": (lambda: with_small_head(models.vgg11_bn(num_classes=7, init_weights=False)), 32),
    "vit": (lambda: models.VisionTransformer(32, 8, 3, 4, 16, 32, dropout=0.1, attention_dropout=0.1, num_classes=7), 32),
    "wide_resnet": (lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=7, width_per_group=32), 32),
}  # fmt: skip


def vector(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.float32)


def images(side: int) -> TensorSpec:
    return vector(3, side, side)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class FromFunction(nn.Module):
    """A model whose forward is a function of itself and its input."""

    def __init__(self, function: Callable[[Any, Any], Any], **members: Any) -> None:
        super().__init__()
        self._function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)


def names(chain: Chain) -> list[str]:
    return [layer.name for layer in chain.layers]


def run(model: Callable[[Tensor], Tensor], x: Tensor, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return model(x)


def gradients(model: Callable[[Tensor], Tensor], parameters: dict[str, nn.Parameter], x: Tensor) -> dict[str, Tensor | None]:
    for parameter in parameters.values():
        parameter.grad = None
    output = run(model, x)
    (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def assert_equal(chain: Chain, model: nn.Module, x: Tensor) -> None:
    """Output, all gradients and all buffers are the same, bit for bit; the model given is not run."""
    twin = copy.deepcopy(model)
    expected = gradients(twin, dict(twin.named_parameters()), x.clone())
    found = gradients(chain, dict(model.named_parameters()), x.clone())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in twin.named_buffers())
    assert torch.equal(run(twin, x.clone(), 6), run(chain, x.clone(), 6))
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert found[name] is not None and torch.equal(gradient, found[name]), name  # noqa: PT018


def assert_cut_anywhere(chain: Chain, x: Tensor) -> None:
    """Layers can run one by one on stored boundaries: shapes are as announced, and no layer changes what it is given."""
    tensors: tuple[Tensor, ...] = (x,)
    for layer, before in zip(chain.layers, chain.boundaries, strict=False):
        assert [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors] == [(spec.shape, spec.dtype) for spec in before]
        assert all(len(tensor) == len(x) for tensor in tensors)
        stored = [tensor.detach().clone() for tensor in tensors]
        given = tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors)
        tensors = layer(*given)
        assert all(torch.equal(one, other) for one, other in zip(stored, given, strict=True))
    assert [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors] == [(s.shape, s.dtype) for s in chain.boundaries[-1]]


def build(family: str) -> tuple[nn.Module, int]:
    make, side = FAMILIES[family]
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            # Heads and scales that start at zero would hide what happens before them.
            if parameter.abs().max() < 1e-3:
                parameter.normal_()
    return model, side


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_torchvision_family_is_same_as_model(family: str) -> None:
    model, side = build(family)
    chain = capture(model.eval(), images(side))
    assert len(chain.layers) >= 5
    assert_equal(chain, model, torch.randn(2, 3, side, side))
    assert_cut_anywhere(chain, torch.randn(1, 3, side, side))


@pytest.mark.parametrize(
    "family", ["convnext", "densenet", "efficientnet", "googlenet", "maxvit", "mobilenet_v3", "resnet", "swin_v2", "vgg", "vit"]
)
def test_train_mode_is_same_as_model(family: str) -> None:
    model, side = build(family)
    chain = capture(model.train(), images(side))
    x = torch.randn(3, 3, side, side)
    assert_equal(chain, model, x)
    assert not torch.equal(run(chain, x, 1), run(chain.eval(), x, 1))
    counts = {int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts <= {3}  # once for each of the three runs in train mode
    assert_cut_anywhere(chain.train(), torch.randn(5, 3, side, side))


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
    ("model", "spec", "expected"),
    [
        (mlp(8, 6, 5, 4), vector(8), ["0", "2", "4"]),
        (nn.Linear(8, 3), vector(8), ["weight"]),
        (nn.Sequential(nn.Linear(8, 3)), vector(8), ["0"]),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3), nn.PReLU(), nn.Linear(3, 3)), vector(2, 4), ["1", "4"]),
        (
            nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(6, 3)),
            vector(8),
            ["0", "4"],
        ),
        (nn.Sequential(nn.Flatten(), nn.Softmax(-1)), vector(2, 4), ["0"]),
        (models.resnet18(num_classes=3), images(32), ["conv1", *(f"layer{n}.{k}" for n in (1, 2, 3, 4) for k in (0, 1)), "fc"]),
        (
            models.vgg11_bn(num_classes=3),
            images(32),
            [*(f"features.{n}" for n in (0, 4, 8, 11, 15, 18, 22, 25)), *(f"classifier.{n}" for n in (0, 3, 6))],
        ),
        (
            models.VisionTransformer(32, 8, 2, 4, 16, 32, num_classes=7),
            images(32),
            ["conv_proj", "encoder.pos_embedding", *(f"encoder.layers.encoder_layer_{n}" for n in (0, 1)), "heads.head"],
        ),
        (
            models.MaxVit((32, 32), 8, 2, [8], [2], 4, 0.2, num_classes=7),
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
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers(model: nn.Module, spec: TensorSpec, expected: list[str]) -> None:
    chain = capture(model, spec)
    assert names(chain) == expected
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


@pytest.mark.parametrize("num_samples", [1, 5])
@pytest.mark.parametrize("family", ["densenet", "googlenet", "vit"])
def test_boundaries_are_those_of_any_batch(family: str, num_samples: int) -> None:
    model, side = build(family)
    assert_cut_anywhere(capture(model.eval(), images(side)), torch.randn(num_samples, 3, side, side))


def test_weights_on_meta_are_enough() -> None:
    with torch.device("meta"):
        # 4 TB of weights: only their shapes are looked at.
        model = nn.Sequential(nn.Linear(8, 10**6), nn.BatchNorm1d(10**6), nn.Linear(10**6, 10**6), nn.ReLU(), nn.Linear(10**6, 2))
    chain = capture(model, vector(8))
    assert names(chain) == ["0", "2", "4"]
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
    assert [parameter.requires_grad for parameter in first.parameters().values()] == [True, False, True, True]
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
    assert names(chain) == ["0", "1", "3"]
    assert chain.boundaries[0] == (TensorSpec((6,), torch.int64),)
    assert chain.boundaries[1] == (vector(6, 4),)
    assert_equal(chain, model, torch.randint(11, (3, 6)))


def test_input_used_later_crosses_the_cuts() -> None:
    model = FromFunction(
        lambda m, x: m.c(torch.cat([m.b(m.a(x)), x], 1)), a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(6, 1)
    )
    chain = capture(model, vector(3))
    assert [len(specs) for specs in chain.boundaries] == [1, 2, 1, 1]
    assert names(chain) == ["a", "b", "c"]
    assert_equal(chain, model, torch.randn(4, 3))


# In place


IN_PLACE: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "module on a skip": (lambda m, x: m.c(m.b(y := m.a(x)) + m.relu(y)), ["a", "c"]),
    "method": (lambda m, x: m.c(m.b(y := m.a(x)) + y.mul_(2)), ["a", "c"]),
    "operator": (lambda m, x: m.c(add_in_place(m.a(x), m.b)), ["a", "c"]),
    "item": (lambda m, x: m.c(set_item(m.a(x), m.b)), ["a", "c"]),
    "out of a function": (lambda m, x: m.c(F.relu(m.a(x), inplace=True) + m.b(x)), ["a", "b", "c"]),
    "view of what is changed": (lambda m, x: m.c(m.b(y := m.a(x)) + y.view(-1, 4).relu_()), ["a", "c"]),
    "base of a view": (lambda m, x: m.c(m.b((y := m.a(x)).view(-1, 4)) + y.relu_()), ["a", "c"]),
    "what comes out": (lambda m, x: m.c(m.relu(m.b(m.a(x)))), ["a", "b", "c"]),
    "views that stay as they are": (lambda m, x: m.c(m.b((y := m.a(x))[:, :4]) + y.view(-1, 4)), ["a", "b", "c"]),
    "inside a block": (lambda m, x: m.c(m.block(y := m.a(x)) + m.b(y)), ["a", "b", "c"]),
    "out argument": (lambda m, x: m.c(m.b(y := m.a(x)) + torch.exp(y.detach(), out=y.detach())), ["a", "c"]),
}


def add_in_place(x: Tensor, module: Callable[[Tensor], Tensor]) -> Tensor:
    hidden = module(x)
    x += 1
    return x * hidden


def set_item(x: Tensor, module: Callable[[Tensor], Tensor]) -> Tensor:
    hidden = module(x)
    x[:, 0] = 1
    return x + hidden


@pytest.mark.parametrize("case", IN_PLACE)
def test_no_cut_before_a_change_in_place(case: str) -> None:
    function, expected = IN_PLACE[case]
    members = {"relu": nn.ReLU(inplace=True), "block": nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True))}
    if case == "inside a block":
        members["block"] = FromFunction(lambda m, x: m.relu(x), relu=nn.ReLU(inplace=True))
    model = FromFunction(function, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2), **members)
    chain = capture(model, vector(4))
    assert names(chain) == expected
    x = torch.randn(3, 4)
    assert torch.equal(chain(x), model(x))
    assert_cut_anywhere(chain, x)

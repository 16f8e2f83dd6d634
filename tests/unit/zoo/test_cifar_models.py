"""The cifar models: that they are the published networks, at any width, and how they are cut into layers."""

import functools
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.zoo.cifar_models import CIFAR_MODELS
from lowmem_pnn.zoo.deferred_init import file_backed, skeleton
from lowmem_pnn.zoo.models import find_model

NARROW = {"width": 0.25}


def make(spec: str, seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    return find_model(spec, arguments, 10).build()


@functools.cache
def empty(spec: str, **arguments: Any) -> Any:
    """The network without values."""
    return skeleton(find_model(spec, arguments, 10).build)


def images(batch: int, channels: int = 3, side: int = 32) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(batch))


def cut(model: nn.Module) -> Chain:
    return capture(model, TensorSpec((3, 32, 32), torch.float32))


def count(model: nn.Module) -> int:
    return sum(map(torch.numel, model.parameters()))


# The published networks.


@pytest.mark.parametrize(
    ("spec", "classes", "expected"),
    [
        ("cifar-resnet18", 10, 11_173_962),
        # torchvision's 11,689,512 for 1000 classes, with a stem of 7 x 7.
        ("cifar-resnet18", 1000, 11_689_512 - 64 * 3 * (7 * 7 - 3 * 3)),
        ("cifar-vgg11", 10, 9_231_114),
        ("cifar-vgg16", 10, 14_728_266),
        # torchvision's 138,365,992 with BatchNorm, with another classifier.
        ("cifar-vgg16", 10, 138_365_992 - (25088 + 1) * 4096 - (4096 + 1) * 4096 - (4096 + 1) * 1000 + (512 + 1) * 10),
        # torchvision's 3,504,872 for 1000 classes.
        ("cifar-mobilenetv2", 1000, 3_504_872),
        ("cifar-mobilenetv2", 10, 3_504_872 - (1280 + 1) * 990),
    ],
)
def test_they_have_as_many_parameters_as_published(spec: str, classes: int, expected: int) -> None:
    assert count(empty(spec, num_classes=classes)) == expected


def reference(spec: str, width: float) -> nn.Module:
    """Torchvision's network, with the early layers for small images."""
    if spec == "cifar-resnet18":
        resnet = models.resnet18(num_classes=10)
        resnet.conv1, resnet.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        return resnet
    if spec == "cifar-mobilenetv2":
        stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
        mobilenet = models.mobilenet_v2(num_classes=10, width_mult=width, inverted_residual_setting=stages)
        mobilenet.features[0][0].stride = (1, 1)
        mobilenet.classifier = mobilenet.classifier[1]
        return mobilenet
    vgg = models.get_model(spec.removeprefix("cifar-") + "_bn", weights=None)
    vgg.avgpool, vgg.classifier = nn.Identity(), nn.Linear(512, 10)
    return vgg


@pytest.mark.parametrize(
    ("spec", "width"), [*((spec, 1.0) for spec in CIFAR_MODELS), ("cifar-mobilenetv2", 0.25), ("cifar-mobilenetv2", 1.5)]
)
def test_they_compute_what_torchvision_does_with_the_same_weights(spec: str, width: float) -> None:
    with torch.device("meta"):
        expected = reference(spec, width)
    expected.to_empty(device="cpu")
    model = make(spec, width=width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.01)  # biases and norms too
    assert list(model.state_dict()) == list(expected.state_dict())
    expected.load_state_dict(model.state_dict())
    for training in (True, False):
        scores = [network.train(training)(images(2)) for network in (model, expected)]
        assert scores[0].shape == (2, 10)
        assert torch.allclose(*scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", CIFAR_MODELS)
def test_initial_values_keep_the_scale(spec: str) -> None:
    model = make(spec, width=0.5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            assert not module.bias.any(), name
    assert bool(model(images(8)).isfinite().all())


# Width, classes, channels.


@pytest.mark.parametrize("spec", CIFAR_MODELS)
@pytest.mark.parametrize("width", [0.001, 0.25, 0.3, 1, 2.0])
def test_channels_follow_the_width_in_eights(spec: str, width: float) -> None:
    given = empty(spec, width=width)
    pairs = [
        (module.out_channels, other.out_channels)
        for module, other in zip(given.modules(), empty(spec, width=1).modules(), strict=True)
        if isinstance(module, nn.Conv2d) and isinstance(other, nn.Conv2d)
    ]
    if spec == "cifar-mobilenetv2":
        assert pairs.pop() == (max(1280, int(1280 * width)), 1280)
        pairs = [pair for number, pair in enumerate(pairs) if number == 0 or number % 3 == 2]  # what leaves a block
    assert all(channels % 8 == 0 for channels, _ in pairs)
    assert all(channels == 8 or abs(channels - width * wanted) <= 4 for channels, wanted in pairs)
    assert given(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("spec", CIFAR_MODELS)
def test_parameters_grow_with_the_square_of_the_width(spec: str) -> None:
    sizes = [count(empty(spec, width=width)) for width in (0.25, 0.5, 1, 2)]
    # The last convolution of MobileNetV2 does not shrink.
    least = 1.5 if spec == "cifar-mobilenetv2" else 3.8
    assert all(least < larger / smaller < 4.1 for smaller, larger in pairwise(sizes)), sizes


@pytest.mark.parametrize("spec", CIFAR_MODELS)
def test_they_are_made_for_the_data(spec: str) -> None:
    source = find_model(spec, {**NARROW, "in_channels": 1}, 100)
    assert (source.name, source.spec, source.input_form, source.context) == (spec, spec, "any", None)
    assert source.build()(images(2, channels=1)).shape == (2, 100)
    assert find_model(spec, NARROW, 100).input_form == "image3"
    with torch.device("meta"):
        assert find_model(spec, {}, None).build()(torch.empty(2, 3, 32, 32)).shape == (2, 10)
        assert find_model(spec, {"num_classes": 12}, 10).build()(torch.empty(2, 3, 64, 64)).shape == (2, 12)


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("cifar-vgg11", {"width": 0}, r"model 'cifar-vgg11': width=0 is no positive number; give, for example, width=0.5$"),
        ("cifar-vgg11", {"width": -0.5}, r"width=-0.5 is no positive number"),
        ("cifar-vgg11", {"width": "wide"}, r"width='wide' is no positive number"),
        ("cifar-vgg11", {"width": True}, r"width=True is no positive number"),
        ("cifar-vgg11", {"width": [1]}, r"width=\[1\] is no positive number"),
        ("cifar-vgg11", {"width": float("inf")}, r"width=inf is no positive number"),
        ("cifar-vgg11", {"width": float("nan")}, r"width=nan is no positive number"),
        ("cifar-vgg11", {"width": 1e30}, r"width=1e\+30 with in_channels=3 .* more values than a tensor can hold; give smaller ones"),
        ("cifar-vgg11", {"width": 10**400}, r"needs more values than a tensor can hold"),
        ("cifar-vgg11", {"num_classes": 10**400}, r"needs more values than a tensor can hold"),
        ("cifar-vgg16", {"in_channels": 0}, r"in_channels=0 is no positive whole number; give, for example, in_channels=3$"),
        ("cifar-vgg16", {"num_classes": 10.0}, r"num_classes=10.0 is no positive whole number"),
        ("cifar-vgg16", {"num_classes": None}, r"num_classes=None is no positive whole number"),
        ("cifar-resnet18", {"num_classes": 9}, r"num_classes=9, but the data set has 10 classes; give num_classes=10"),
        (
            "cifar-resnet18",
            {"widht": 1},
            r"model 'cifar-resnet18' has no argument 'widht'; did you mean 'width'\?; it accepts: num_classes, width, in_channels$",
        ),
        ("cifar-resnet18", {"norm": 1}, r"has no argument 'norm'; it accepts: num_classes, width, in_channels$"),
        (
            "cifar-resnet18:width=0.25",
            {},
            r"no model 'cifar-resnet18:width=0.25'; write --model cifar-resnet18, and, for example, --model-arg width=0.5$",
        ),
        ("cifar-resnet-18", {}, r"there is no model 'cifar-resnet-18'; did you mean 'cifar-resnet18'.*; a model is mlp:.*cifar-vgg16,"),
        ("CIFAR_VGG16", {}, r"did you mean 'cifar-vgg16'"),
        ("cifar-mobilenet", {}, r"did you mean 'cifar-mobilenetv2'"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_said(spec: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        find_model(spec, arguments, 10)
    assert "\n" not in str(raised.value)


# Their layers.


@pytest.mark.parametrize(
    ("spec", "num_layers", "first", "last"),
    [
        ("cifar-resnet18", 10, ["conv1", "layer1.0", "layer1.1"], ["layer4.1", "fc"]),
        ("cifar-vgg11", 9, ["features.0", "features.4"], ["features.25", "classifier"]),
        ("cifar-vgg16", 14, ["features.0", "features.3"], ["features.40", "classifier"]),
        ("cifar-mobilenetv2", 22, ["features.0.0", "features.1"], ["features.18.0", "classifier"]),  # two large blocks are opened
    ],
)
def test_they_are_cut_at_every_block_and_the_chain_is_same_as_the_model(
    spec: str, num_layers: int, first: list[str], last: list[str]
) -> None:
    equals = [make(spec, width=0.125) for _ in range(2)]
    chain = cut(equals[1])
    chain = chain.between_blocks or chain
    names = [layer.name for layer in chain.layers]
    assert (len(names), names[: len(first)], names[-len(last) :]) == (num_layers, first, last)
    assert [len(boundary) for boundary in chain.boundaries] == [1] * (num_layers + 1)
    # Maps everywhere but before and after the linear layer, which is alone.
    assert [len(spec.shape) for (spec,) in chain.boundaries] == [3] * (num_layers - 1) + [1, 1]
    assert len(chain.layers[-1].parameters()) == 2
    assert (chain.unused, chain.ties) == ((), ())
    results = []
    for model, forward in zip(equals, (equals[0], chain), strict=True):
        found = []
        for training in (True, False):
            model.zero_grad()
            scores = forward.train(training)(images(3))
            scores.square().mean().backward()
            found += [
                scores,
                *(parameter.grad for parameter in model.parameters()),
                *(buffer.clone() for buffer in model.buffers()),
            ]
        results.append(found)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("spec", CIFAR_MODELS)
def test_they_are_built_in_files_with_the_same_values(spec: str, tmp_path: Path) -> None:
    expected = make(spec, **NARROW).state_dict()
    with file_backed(tmp_path, at_least=1):
        found = make(spec, **NARROW).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_they_learn() -> None:
    model = make("cifar-resnet18", width=0.125)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = images(20), torch.arange(20) % 10
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3

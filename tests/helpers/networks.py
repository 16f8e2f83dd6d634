"""Networks to cut, and what is to hold for every chain."""

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from lowmem_pnn.model.chain import Chain, TensorSpec

models = torchvision.models


def with_small_head(make: Callable[[], nn.Module]) -> nn.Module:
    """VGG's and AlexNet's own heads have 4,096 units and most of the weights."""
    with torch.device("meta"):
        model = make()
        [fan_in] = [layer.in_features for layer in model.classifier[:2] if isinstance(layer, nn.Linear)]
        model.classifier = nn.Sequential(nn.Linear(fan_in, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 7))
    for module in model.to_empty(device="cpu").modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


_mb, _fused_mb = models.efficientnet.MBConvConfig, models.efficientnet.FusedMBConvConfig

# One small member of each family of torchvision's classification networks, and the side of the images it gets.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (lambda: with_small_head(models.alexnet), 63),
    "convnext": (
        lambda: models.ConvNeXt(
            [models.convnext.CNBlockConfig(8, 16, 2), models.convnext.CNBlockConfig(16, None, 2)], 0.2, num_classes=7
        ),
        32,
    ),
    "densenet": (lambda: models.DenseNet(8, (2, 3, 2), 16, num_classes=7), 32),
    "efficientnet": (
        lambda: models.EfficientNet(
            [_mb(1, 3, 1, 8, 8, 1), _mb(4, 3, 2, 8, 16, 2), _mb(4, 5, 2, 16, 24, 1)], 0.2, 0.2, num_classes=7, last_channel=40
        ),
        32,
    ),
    "efficientnet_v2": (
        lambda: models.EfficientNet(
            [_fused_mb(1, 3, 1, 8, 8, 1), _fused_mb(4, 3, 2, 8, 16, 2), _mb(4, 3, 2, 16, 24, 1)], 0.2, 0.2, num_classes=7,
            last_channel=40, norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-3),
        ),
        32,
    ),
    "googlenet": (lambda: models.googlenet(num_classes=7, aux_logits=False, init_weights=False), 32),
    "inception_v3": (lambda: models.inception_v3(num_classes=7, aux_logits=False, init_weights=False), 75),
    "maxvit": (
        lambda: models.MaxVit(
            input_size=(32, 32), stem_channels=8, partition_size=2, block_channels=[8], block_layers=[2], head_dim=4,
            stochastic_depth_prob=0.2, num_classes=7,
        ),
        32,
    ),
    "mnasnet": (lambda: models.mnasnet0_5(num_classes=7), 32),
    "mobilenet_v2": (lambda: models.MobileNetV2(7, inverted_residual_setting=[[1, 8, 1, 1], [6, 16, 2, 2]]), 32),
    "mobilenet_v3": (
        lambda: models.MobileNetV3(
            [
                models.mobilenetv3.InvertedResidualConfig(*setting, 1, 1.0)
                for setting in ((8, 3, 8, 8, True, "RE", 2), (8, 3, 24, 16, False, "RE", 2), (16, 5, 32, 16, True, "HS", 1))
            ],
            48, num_classes=7,
        ),
        32,
    ),
    "regnet": (lambda: models.RegNet(models.regnet.BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25), 7), 32),
    "resnet": (lambda: models.resnet18(num_classes=7), 32),
    "resnext": (lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 2], num_classes=7, groups=4, width_per_group=8), 32),
    "shufflenet_v2": (lambda: models.ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 48], num_classes=7), 32),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=7), 32),
    "swin": (lambda: models.SwinTransformer([2, 2], 16, [2, 1], [2, 4], [4, 4], stochastic_depth_prob=0.2, num_classes=7), 32),
    "swin_v2": (
        lambda: models.SwinTransformer(
            [2, 2], 16, [2, 1], [2, 4], [4, 4], stochastic_depth_prob=0.2, num_classes=7,
            block=models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=models.swin_transformer.PatchMergingV2,
        ),
        32,
    ),
    "vgg": (lambda: with_small_head(lambda: models.vgg11_bn(init_weights=False)), 32),
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


def layer_names(chain: Chain) -> list[str]:
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

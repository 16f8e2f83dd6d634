"""Models `cifar-resnet18`, `cifar-vgg11`, `cifar-vgg16` and `cifar-mobilenetv2`: the usual networks for small images, of any width.

    images (B, C, 32, 32) -> blocks (B, W, S, S) -> mean over positions (B, W) -> linear -> scores (B, classes)

B samples, C input channels, W channels of the last block, S side of its map. These are published networks without the early strides
that images of 224 pixels need. Modules have their names in torchvision, so that weights of the blocks can be exchanged.

| name | early layers here | S | parameters (10 classes) | from |
| --- | --- | --- | --- | --- |
| `cifar-resnet18` | 3x3 convolution of stride 1, no pooling | 4 | 11,173,962 | He et al. 2016, arXiv 1512.03385, table 1 |
| `cifar-vgg11` | as published (A), with BatchNorm; one linear layer | 1 | 9,231,114 | Simonyan & Zisserman 2015, arXiv 1409.1556, table 1 |
| `cifar-vgg16` | as published (D), with BatchNorm; one linear layer | 1 | 14,728,266 | the same |
| `cifar-mobilenetv2` | stem and first strided stage at stride 1 | 4 | 2,236,682 | Sandler et al. 2018, arXiv 1801.04381, table 2 |
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lowmem_pnn.errors import ConfigError

# Bytes of a tensor, and of what training keeps with it, are counted in 64 bits.
_MOST_VALUES = 2**56
_MOST_CHANNELS = 1280

# Channels of convolutions, and 0 for each max-pool: configurations A and D.
_VGG11 = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
# Stages: expansion, channels, blocks, stride of the first block. The published strides are 1, 2, 2, 2, 1, 2, 1.
_MOBILENET_V2 = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


@dataclass(frozen=True, kw_only=True)
class CifarShape:
    """Sizes of a model, as its arguments say them.

    Args:
        num_classes: Scores of a sample.
        width: Factor of all channels but the input's.
        in_channels: Channels of the images.
    """

    num_classes: int = 10
    width: float = 1.0
    in_channels: int = 3


def make_cifar(spec: str, shape: CifarShape) -> Callable[[], nn.Module]:
    """Return the constructor of a model.

    Args:
        spec: Name of the model, one of `CIFAR_MODELS`.
        shape: Sizes of the model; the values may be of any type, as they come from the command line.

    Raises:
        ConfigError: A value is one that a model cannot have.
    """
    for name in ("num_classes", "in_channels"):
        value = getattr(shape, name)
        if type(value) is not int or value < 1:
            example = getattr(CifarShape, name)
            raise ConfigError(
                f"model {spec!r}: {name}={value!r} is no positive whole number; give, for example, {name}={example}"
            )
    if type(shape.width) not in (int, float) or not 0 < shape.width < math.inf:
        raise ConfigError(f"model {spec!r}: width={shape.width!r} is no positive number; give, for example, width=0.5")
    # In whole numbers, which do not overflow.
    most = _MOST_CHANNELS * math.ceil(shape.width)
    if most * max(9 * most, 9 * shape.in_channels, shape.num_classes) > _MOST_VALUES:
        raise ConfigError(
            f"model {spec!r}: width={shape.width} with in_channels={shape.in_channels} and num_classes={shape.num_classes} needs more "
            "values than a tensor can hold; give smaller ones, for example width=1.0"
        )
    build = _BUILDERS[spec]
    return lambda: build(shape)


def scale_channels(channels: int, width: float) -> int:
    """Return the channels of a layer in a network of another width: the nearest multiple of 8, and at least 8.

    Args:
        channels: Channels at width 1.
        width: Factor of the channels.

    Example:
        >>> [scale_channels(64, width) for width in (0.01, 0.25, 0.3, 1, 2.0)]
        [8, 16, 16, 64, 128]
    """
    return max(8, math.floor(channels * width / 8 + 0.5) * 8)


class ResNet18(nn.Module):
    """Residual network of four stages with two basic blocks each, at 1, 1/2, 1/4 and 1/8 of the image's side.

    Args:
        shape: Sizes of the model.
    """

    def __init__(self, shape: CifarShape) -> None:
        super().__init__()
        widths = [scale_channels(channels, shape.width) for channels in (64, 128, 256, 512)]
        self.conv1 = _convolution(shape.in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(widths[0], widths[0]), BasicBlock(widths[0], widths[0]))
        self.layer2 = nn.Sequential(BasicBlock(widths[0], widths[1], 2), BasicBlock(widths[1], widths[1]))
        self.layer3 = nn.Sequential(BasicBlock(widths[1], widths[2], 2), BasicBlock(widths[2], widths[2]))
        self.layer4 = nn.Sequential(BasicBlock(widths[2], widths[3], 2), BasicBlock(widths[3], widths[3]))
        self.fc = nn.Linear(widths[3], shape.num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Score (B, C, height, width) images: (B, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        scores: Tensor = self.fc(_mean_over_positions(x))
        return scores


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, added to the block's input; where the shapes differ, to a 1x1 convolution of the input.

    Args:
        channels_in: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _convolution(channels_in, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _convolution(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                _convolution(channels_in, channels, kernel=1, stride=stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels_in, S, S) to (B, channels, S / stride, S / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(x + shortcut)
        return out


class FeatureClassifier(nn.Module):
    """Blocks one after the other, the mean over the positions of the last one's output, and a linear layer.

    Args:
        features: Blocks.
        channels: Channels of the last block's output.
        num_classes: Scores of a sample.
    """

    def __init__(self, features: Sequence[nn.Module], channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Score (B, C, height, width) images: (B, classes)."""
        scores: Tensor = self.classifier(_mean_over_positions(self.features(x)))
        return scores


class InvertedResidual(nn.Module):
    """A 1x1 convolution to more channels, a depthwise 3x3 and a 1x1 to few; added to the block's input where the shapes are the same.

    Args:
        channels_in: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the depthwise convolution.
        expansion: Factor of the channels in between; 1 leaves the first convolution out.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * channels_in
        self.is_residual = stride == 1 and channels_in == channels
        self.conv = nn.Sequential(
            *([_conv_norm_relu6(channels_in, inner, kernel=1)] if expansion > 1 else []),
            _conv_norm_relu6(inner, inner, stride=stride, groups=inner),
            _convolution(inner, channels, kernel=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels_in, S, S) to (B, channels, S / stride, S / stride)."""
        added: Tensor = self.conv(x)
        return x + added if self.is_residual else added


def _vgg(shape: CifarShape, configuration: Sequence[int]) -> nn.Module:
    """Build the convolutions of a VGG, with biases as in the paper, and a linear layer after the last pool."""
    layers: list[nn.Module] = []
    channels = shape.in_channels
    for channels_at_1 in configuration:
        if channels_at_1 == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        channels_in, channels = channels, scale_channels(channels_at_1, shape.width)
        layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return FeatureClassifier(layers, channels, shape.num_classes)


def _mobilenet_v2(shape: CifarShape) -> nn.Module:
    channels = scale_channels(32, shape.width)
    blocks: list[nn.Module] = [_conv_norm_relu6(shape.in_channels, channels)]
    for expansion, channels_at_1, num_blocks, first_stride in _MOBILENET_V2:
        for number in range(num_blocks):
            channels_in, channels = channels, scale_channels(channels_at_1, shape.width)
            blocks.append(InvertedResidual(channels_in, channels, first_stride if number == 0 else 1, expansion))
    # Section 4 of the paper: below width 1 all layers are narrower but the last convolution.
    last = scale_channels(_MOST_CHANNELS, max(1.0, shape.width))
    blocks.append(_conv_norm_relu6(channels, last, kernel=1))
    return FeatureClassifier(blocks, last, shape.num_classes)


def _convolution(channels_in: int, channels: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Build a convolution without biases, since a BatchNorm follows."""
    return nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _conv_norm_relu6(channels_in: int, channels: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = _convolution(channels_in, channels, kernel=kernel, stride=stride, groups=groups)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU6(inplace=True))


def _mean_over_positions(x: Tensor) -> Tensor:
    """Map (B, W, S, S) to (B, W)."""
    return x.mean((2, 3))


def _initialise(model: nn.Module) -> None:
    """Initialise convolutions as He et al. 2015 (arXiv 1502.01852), section 2.2, by the number of their outputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_BUILDERS: dict[str, Callable[[CifarShape], nn.Module]] = {
    "cifar-resnet18": ResNet18,
    "cifar-vgg11": lambda shape: _vgg(shape, _VGG11),
    "cifar-vgg16": lambda shape: _vgg(shape, _VGG16),
    "cifar-mobilenetv2": _mobilenet_v2,
}

CIFAR_MODELS = (*_BUILDERS,)
"""Names of the models."""

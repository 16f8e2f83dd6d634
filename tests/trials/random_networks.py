"""Random small networks of many kinds, each with random data that it takes: functions of a seed."""

import random
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.efficientnet import FusedMBConv, FusedMBConvConfig, MBConv, MBConvConfig
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.squeezenet import Fire
from torchvision.ops import SqueezeExcitation

CLASSES = 5
VOCABULARY = 50

Data = tuple[Tensor, Tensor]
Network = tuple[nn.Module, Callable[[int], Data]]
"""A network, and a function that makes so many samples with their labels."""


def build(seed: int) -> nn.Module:
    """Build the network of a seed."""
    return _network(seed)[0]


def data(seed: int) -> tuple[Data, Data]:
    """Make training and test samples for the network of a seed."""
    with torch.random.fork_rng(devices=[]):
        samples = _network(seed)[1]
        torch.manual_seed(seed)
        return samples(random.Random(seed).randint(30, 60)), samples(10)


def kind_of(seed: int) -> str:
    """Return the kind of the network of a seed."""
    return random.Random(seed).choice(list(KINDS))


def _network(seed: int) -> Network:
    chance = random.Random(seed)
    return KINDS[chance.choice(list(KINDS))](chance)


def _activation(chance: random.Random) -> nn.Module:
    return chance.choice([nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU])()


def _mlp(chance: random.Random) -> Network:
    widths = [chance.choice([20, 64, 300])] + [chance.choice([64, 200, 512, 1024]) for _ in range(chance.randint(2, 6))]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers.append(nn.Linear(inputs, outputs, bias=chance.random() < 0.8))
        layers += chance.choice([[], [], [nn.BatchNorm1d(outputs)], [nn.LayerNorm(outputs)]])
        layers.append(_activation(chance))
        layers += chance.choice([[], [], [nn.Dropout(0.2)]])
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES)), lambda count: (torch.randn(count, widths[0]), _labels(count))


def _images(side: int) -> Callable[[int], Data]:
    return lambda count: (torch.rand(count, 3, side, side), _labels(count))


def _labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


class Residual(nn.Module):
    """Adds what goes in to what comes out."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _norm(chance: random.Random, channels: int) -> nn.Module:
    norms = [nn.BatchNorm2d(channels), nn.BatchNorm2d(channels), nn.GroupNorm(4, channels), nn.InstanceNorm2d(channels)]
    return chance.choice(norms)


def _cnn(chance: random.Random) -> Network:
    channels, side = chance.choice([16, 32, 64]), chance.choice([6, 8, 12])
    layers = [nn.Conv2d(3, channels, 3, padding=1), _norm(chance, channels), _activation(chance)]
    for _ in range(chance.randint(1, 4)):
        wider, stride = channels * chance.choice([1, 2]), chance.choice([1, 2])
        kind = chance.choice(["plain", "depthwise", "residual", "grouped"])
        if kind == "residual":
            layers.append(
                Residual(
                    nn.Conv2d(channels, channels, 3, padding=1),
                    _norm(chance, channels),
                    _activation(chance),
                    nn.Conv2d(channels, channels, 1),
                )
            )
        elif kind == "depthwise":
            layers += [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels), nn.BatchNorm2d(channels)]
        groups = 4 if kind == "grouped" else 1
        layers += [nn.Conv2d(channels, wider, 3, stride, 1, groups=groups), _norm(chance, wider), _activation(chance)]
        channels = min(wider, 256)
        if wider > 256:
            layers.append(nn.Conv2d(wider, channels, 1))
    head = chance.choice([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d(2)])
    size = 4 if head.output_size == 2 else 1
    return nn.Sequential(*layers, head, nn.Flatten(), nn.Linear(channels * size, CLASSES)), _images(side)


def _torchvision(chance: random.Random) -> Network:
    channels, side = chance.choice([16, 32, 64]), chance.choice([6, 8, 12])
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    for _ in range(chance.randint(1, 3)):
        kind = chance.choice(["basic", "bottleneck", "inverted", "convnext", "dense", "fire", "mbconv", "fused", "squeeze"])
        if kind == "basic":
            layers.append(BasicBlock(channels, channels))
        elif kind == "bottleneck":
            layers.append(Bottleneck(channels, channels // 4))
        elif kind == "inverted":
            layers.append(InvertedResidual(channels, channels, 1, chance.choice([2, 4, 6])))
        elif kind == "convnext":
            layers.append(CNBlock(channels, 1e-2, 0.0))
        elif kind == "dense":
            layers += [_DenseBlock(2, channels, 2, 8, 0.0, False), _Transition(channels + 16, channels)]
        elif kind == "fire":
            layers.append(Fire(channels, channels // 4, channels // 2, channels // 2))
        elif kind == "mbconv":
            layers.append(MBConv(MBConvConfig(4, 3, 1, channels, channels, 1), 0.0, nn.BatchNorm2d))
        elif kind == "fused":
            layers.append(FusedMBConv(FusedMBConvConfig(4, 3, 1, channels, channels, 1), 0.0, nn.BatchNorm2d))
        else:
            layers.append(SqueezeExcitation(channels, channels // 4))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)), _images(side)


class Transformer(nn.Module):
    """An encoder over tokens, whose mean is classified; or, for each token, the next one."""

    def __init__(self, width: int, heads: int, depth: int, length: int, dropout: float, *, per_token: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(torch.zeros(1, length, width))
        layer = lambda: nn.TransformerEncoderLayer(  # noqa: E731 - a function would be longer
            width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=depth % 2 == 0
        )
        self.blocks = nn.Sequential(*(layer() for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY if per_token else CLASSES)
        self.per_token = per_token

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embed(x) + self.places))
        return self.head(x if self.per_token else x.mean(1))


def _decoder(chance: random.Random) -> Network:
    return _transformer(chance, per_token=True)


def _transformer(chance: random.Random, *, per_token: bool = False) -> Network:
    heads, length = chance.choice([1, 2, 4]), chance.choice([8, 16])
    width, depth, dropout = 32 * chance.choice([1, 2, 4, 8]), chance.randint(1, 3), chance.choice([0.0, 0.1])

    def samples(count: int) -> Data:
        tokens = torch.randint(VOCABULARY, (count, length + 1))
        return (tokens[:, :-1], tokens[:, 1:].contiguous()) if per_token else (tokens[:, 1:].contiguous(), _labels(count))

    return Transformer(width, heads, depth, length, dropout, per_token=per_token), samples


class Recurrent(nn.Module):
    """An LSTM or a GRU over vectors, whose last output is classified."""

    def __init__(self, inputs: int, width: int, depth: int, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.widen = nn.Linear(inputs, width)
        self.recurrent = kind(width, width, depth, batch_first=True, dropout=0.1 if depth > 1 else 0.0)
        self.narrow = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.recurrent(self.widen(x))[0][:, -1])


def _recurrent(chance: random.Random) -> Network:
    inputs, length, width = chance.choice([4, 16]), chance.choice([6, 12]), chance.choice([32, 128, 256])
    network = Recurrent(inputs, width, chance.randint(1, 3), chance.choice([nn.LSTM, nn.GRU]))
    return network, lambda count: (torch.randn(count, length, inputs), _labels(count))


KINDS: dict[str, Callable[[random.Random], Network]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "torchvision": _torchvision,
    "transformer": _transformer,
    "decoder": _decoder,
    "recurrent": _recurrent,
}
"""Makes a network by its kind."""

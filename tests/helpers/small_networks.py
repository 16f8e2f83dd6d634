"""Small networks and the data they learn: layers of every kind, ties, BatchNorm, dropout, buffers."""

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from lowmem_pnn.zoo.gpt_model import GPT, GptShape

Data = tuple[Tensor, Tensor]


def vectors(num_samples: int = 40, width: int = 12, num_classes: int = 4, seed: int = 0) -> Data:
    """Samples around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num_samples) % num_classes
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    return centres[y] + torch.randn(num_samples, width, generator=generator) / 2, y


def images(num_samples: int = 40, side: int = 8, num_classes: int = 4, seed: int = 0) -> Data:
    x, y = vectors(num_samples, 3 * side * side, num_classes, seed)
    return x.view(-1, 3, side, side), y


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))


def small_conv() -> nn.Module:
    """Four layers, with BatchNorm and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(12 * 16, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 4),
    )  # fmt: skip


def small_tokens() -> nn.Module:
    """Three tokens of four values; two boundaries of tokens after them."""
    return nn.Sequential(
        nn.Unflatten(1, (3, 4)), nn.Linear(4, 8), nn.ReLU(),
        nn.Linear(8, 6), nn.ReLU(),
        nn.Linear(6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


def small_resnet() -> nn.Module:
    """ResNet-18 with one block in each of two stages, and few channels."""
    widen = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        BasicBlock(8, 8), BasicBlock(8, 12, 2, widen),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def small_mobilenet() -> nn.Module:
    settings = [[1, 8, 1, 1], [3, 8, 2, 1]]
    model: nn.Module = torchvision.models.MobileNetV2(num_classes=4, width_mult=0.25, inverted_residual_setting=settings)
    return model


def small_vit() -> nn.Module:
    model: nn.Module = torchvision.models.VisionTransformer(8, 4, 2, 2, 16, 24, dropout=0.1, attention_dropout=0.1, num_classes=4)
    nn.init.normal_(model.get_parameter("heads.head.weight"), std=0.1)  # zeros would hide what comes before them
    return model


def small_convnext() -> nn.Module:
    """Axes that are permuted to and fro, so that tensors are not in the order of their axes; stochastic depth."""
    block = torchvision.models.convnext.CNBlockConfig
    model: nn.Module = torchvision.models.ConvNeXt([block(8, 12, 1), block(12, None, 1)], 0.3, num_classes=4)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.ones_(parameter)
    return model


def small_densenet() -> nn.Module:
    model: nn.Module = torchvision.models.DenseNet(4, (2, 2), 8, bn_size=2, drop_rate=0.1, num_classes=4)
    return model


class SmallUnet(nn.Module):
    """The input, and what the first layer gives, are used at once and by the last layer, and by none between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.last = nn.Conv2d(15, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(x).relu()
        narrow = self.down(wide).relu()
        middle = self.middle(narrow).relu()
        up = self.up(torch.cat([middle, narrow], 1)).relu()
        last = self.last(torch.cat([up, wide, x], 1)).relu()
        scores: Tensor = self.head(last.mean((2, 3)) + wide.mean((2, 3)))
        return scores


class Averaged(nn.Module):
    """Keeps a running mean by assigning to its buffer, and reads it."""

    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x - self.mean


def averaging_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), Averaged(16), nn.ReLU(), nn.Linear(16, 16), Averaged(16), nn.ReLU(), nn.Linear(16, 4))


class Masked(nn.Module):
    """Tokens, which have no gradient, are used by the first layer and by the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 10)
        self.inner = nn.Linear(10, 10)
        self.outer = nn.Linear(10, 10)
        self.head = nn.Linear(10, 13)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.inner(x).relu()
        x = self.outer(x).relu()
        scores: Tensor = self.head(x * (ids > 3).unsqueeze(-1))
        return scores


class TiedThrice(nn.Module):
    """One weight in the first, the second and the last layer; a bias in two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)]
        )
        for number in (1, 3):
            self.layers[number].weight = self.layers[0].weight
        self.layers[3].bias = self.layers[1].bias

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        scores: Tensor = self.layers[-1](x)
        return scores


def small_gpt(tied: bool, dropout: float = 0.1, layers: int = 2, width: int = 16, context: int = 8) -> nn.Module:
    model = GPT(GptShape(layers=layers, width=width, heads=2, context=context, dropout=dropout, tied=tied), 13)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)  # else little is learnt in so few steps
    return model


def tokens(num_samples: int = 20, length: int = 8, seed: int = 0) -> Data:
    """Tokens, and the ones after them."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(13, (num_samples, 1), generator=generator)
    ids = (start + 5 * torch.arange(length + 1) + torch.randint(2, (num_samples, length + 1), generator=generator)) % 13
    return ids[:, :-1].clone(), ids[:, 1:].clone()


class Forgets(nn.Module):
    """Has a layer whose output it returns, and nobody looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.forgotten, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        body = self.body(x)
        return {"extra": self.forgotten(body), "logits": self.head(body)}

    @staticmethod
    def loss(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Look at one of both outputs."""
        return nn.functional.cross_entropy(outputs["logits"], labels)


def conv_layers() -> nn.Sequential:
    """Three units and class scores; BatchNorm and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(0.2),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 16, 4),
    )  # fmt: skip


def wide_mlp() -> nn.Module:
    """Six layers whose weights outweigh their activations."""
    layers = [nn.Sequential(nn.Linear(96, 96), nn.ReLU()) for _ in range(5)]
    return nn.Sequential(*(module for layer in layers for module in layer), nn.Linear(96, 4))


class Overflows(nn.Module):
    """Gradients that are infinite in float16 unless the loss's scale is small; the scores are ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(self.first(x).relu() * 4096) / 64
        return scores


class Floats(nn.Module):
    """Float32 crosses its cuts, whatever it computes in; gradients overflow in float16 until the loss's scale is small."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu().float() * 64
        x = self.second(x).relu().float() * 64
        scores: Tensor = self.last(x) / 64
        return scores


class Attending(nn.Module):
    """Attends by a bias for each pair of tokens, which comes with each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 24) for _ in range(3)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for block in self.blocks:
            queries, keys, values = block(x)[:, None].chunk(3, -1)
            x = x + nn.functional.scaled_dot_product_attention(queries, keys, values, bias)[:, 0]
        scores: Tensor = self.head(x.mean(1))
        return scores


def biased_tokens(num_samples: int = 29, length: int = 16) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Samples (length, 8) around a centre for each class, each with a bias (1, length, length)."""
    x, y = vectors(num_samples, length * 8)
    return (x.view(-1, length, 8), torch.randn(num_samples, 1, length, length, generator=torch.Generator().manual_seed(7))), y

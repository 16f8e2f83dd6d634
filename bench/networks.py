"""Networks for the benches, as factories that `--model bench/networks.py:NAME` takes.

    deep_mlp    many narrow layers, sigmoid or ReLU, PyTorch's default initialisation: where gradients vanish
    resnet18    for 32x32 images: 3x3 stem, no early pooling (He et al. 2016, section 4.2, with ImageNet's four stages)
    resnet      for 32x32 images: three stages of as many blocks as the depth says, 16, 32, 64 channels (He et al. 2016, section 4.2)
    vit         a small vision transformer with pre-norm blocks (Dosovitskiy et al. 2021), mean over tokens, no class token

x (B, C, H, W): images; t (B, T, D): tokens of D features.
"""

import torch
from torch import Tensor, nn


def deep_mlp(
    depth: int = 12, width: int = 100, activation: str = "sigmoid", scaled: bool = False, pixels: int = 784, num_classes: int = 47
) -> nn.Sequential:
    """`depth` hidden layers of `width`, then the class scores.

    Args:
        depth: hidden layers.
        width: of each.
        activation: `sigmoid` or `relu`, after every hidden layer.
        scaled: start from weights that keep the signal's size: four times Glorot's for sigmoid (2010), He's for ReLU (2015), biases
            0; instead of PyTorch's default.
        pixels: of an image.
        num_classes: outputs.

    Returns:
        Flatten, the hidden layers (`1.0`, `2.0`, ... are their names at a cut), the last layer.
    """
    kind = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}[activation]
    widths = [pixels, *[width] * depth]
    hidden = [nn.Sequential(nn.Linear(widths[at], width), kind()) for at in range(depth)]
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))
    if scaled:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
                if activation == "sigmoid":
                    nn.init.xavier_normal_(layer.weight, gain=4)
                else:
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a skip around them.

    Args:
        channels_in: of the input.
        channels: of the output.
        stride: of the first convolution.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        same = stride == 1 and channels_in == channels
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) -> (B, channels, H / stride, W / stride)."""
        inner = self.relu(self.bn1(self.conv1(x)))
        y: Tensor = self.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))
        return y


def resnet18(width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """ResNet-18 for 32x32 images.

    Args:
        width: of its 64, 128, 256, 512 channels.
        num_classes: outputs.

    Returns:
        `stem`, `block1` to `block8`, `head`; maps of 32, 32, 32, 16, 16, 8, 8, 4, 4 pixels.
    """
    channels = [int(count * width) for count in (64, 128, 256, 512)]
    model = nn.Sequential()
    model.add_module(
        "stem", nn.Sequential(nn.Conv2d(3, channels[0], 3, 1, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU())
    )
    now = channels[0]
    for block in range(8):
        stage, second = divmod(block, 2)
        model.add_module(f"block{block + 1}", BasicBlock(now, channels[stage], 2 if stage and not second else 1))
        now = channels[stage]
    model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(now, num_classes)))
    return model


def resnet(depth: int = 20, width: int = 16, channels: int = 3, num_classes: int = 10) -> nn.Sequential:
    """ResNet-20, ResNet-32 and so on for 32x32 images.

    Args:
        depth: layers with weights, 6 n + 2.
        width: channels of the first stage.
        channels: of an image.
        num_classes: outputs.

    Returns:
        `stem`, `block1` to `block(3 n)`, `head`.
    """
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()))
    now, blocks = width, (depth - 2) // 6
    for block in range(3 * blocks):
        stage, place = divmod(block, blocks)
        model.add_module(f"block{block + 1}", BasicBlock(now, width << stage, 2 if stage and not place else 1))
        now = width << stage
    model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(now, num_classes)))
    return model


class Embedding(nn.Module):
    """Patches as tokens, with learnt positions.

    Args:
        patch: pixels of a patch's side.
        width: features of a token.
        tokens: patches of an image.
    """

    def __init__(self, patch: int, width: int, tokens: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, T, D)."""
        t: Tensor = self.patches(x).flatten(2).transpose(1, 2)
        return t + self.positions


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        width: features of a token.
        heads: divide them.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(t).chunk(3, -1))
        mixed: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        width: features of a token.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        t = t + self.attention(self.norm1(t))
        added: Tensor = self.mlp(self.norm2(t))
        return t + added


class Head(nn.Module):
    """Class scores of the tokens' mean.

    Args:
        width: features of a token.
        num_classes: outputs.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, num_classes)

    def forward(self, t: Tensor) -> Tensor:
        """(B, T, D) -> (B, classes)."""
        scores: Tensor = self.scores(self.norm(t).mean(1))
        return scores


def vit(depth: int = 6, width: int = 128, heads: int = 4, patch: int = 4, size: int = 32, num_classes: int = 10) -> nn.Sequential:
    """A vision transformer for small images.

    Args:
        depth: blocks.
        width: features of a token.
        heads: of each attention.
        patch: pixels of a patch's side.
        size: pixels of an image's side.
        num_classes: outputs.

    Returns:
        `embedding`, `block1` to `blockN`, `head`.
    """
    model = nn.Sequential()
    model.add_module("embedding", Embedding(patch, width, (size // patch) ** 2))
    for block in range(depth):
        model.add_module(f"block{block + 1}", Block(width, heads))
    model.add_module("head", Head(width, num_classes))
    return model

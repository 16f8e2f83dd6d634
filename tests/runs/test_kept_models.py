"""Models as people write them: trained in pieces they are bit-equal to plain PyTorch, load strictly and score the same."""

import functools
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from helpers.exact_runs import COMMON, fit
from helpers.plainloops import assert_same_weights, loaded, train_by_exact
from helpers.small_networks import Data, images, small_mlp, vectors

TOKENS = (torch.arange(240).reshape(40, 6) * 7 % 11, torch.arange(40) % 4)


# Hooks, parametrizations, wrappers.


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))
    model[0].register_forward_hook(lambda module, inputs, output: output * 1.5)
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.25,))
    model[2].register_full_backward_hook(lambda module, leaving, arriving: (leaving[0] * 0.5,))
    return model


def parametrized() -> nn.Module:
    kinds = parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal
    return nn.Sequential(*(module for kind in kinds for module in (kind(nn.Linear(12, 12)), nn.ReLU())), nn.Linear(12, 4))


def parametrized_as_before() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm has a successor
        kinds = [
            nn.utils.weight_norm,
            nn.utils.spectral_norm,
            functools.partial(prune.random_unstructured, name="weight", amount=0.5),
        ]
        return nn.Sequential(*(module for kind in kinds for module in (kind(nn.Linear(12, 12)), nn.ReLU())), nn.Linear(12, 4))


def after_a_dry_run() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lazy modules may change
        model = nn.Sequential(
            nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
        )
    model(torch.rand(2, 3, 8, 8))
    return model


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(12, 12).requires_grad_(False)
        self.down, self.up = nn.Linear(12, 2, bias=False), nn.Linear(2, 12, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + 0.5 * self.up(self.down(x))
        return y


def adapted() -> nn.Module:
    return nn.Sequential(Lora(), nn.ReLU(), Lora(), nn.ReLU(), nn.Linear(12, 4))


# Sequences.


class Sequences(nn.Module):
    """An LSTM in both directions with dropout, and a GRU that is told where to begin."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.2, bidirectional=True, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 6))
        self.gru = nn.GRU(8, 6, batch_first=True)
        self.hidden, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x.view(-1, 4, 3))
        z, last = self.gru(y, self.start.expand(1, x.shape[0], 6).contiguous())
        scores: Tensor = self.head(self.hidden(z.mean(1) + last[0]).relu())
        return scores


class Video(nn.Module):
    """Frames folded into the batch for a convolution, and unfolded for a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, stride=2), nn.Conv2d(4, 4, 3)
        self.gru = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, h, w = x.shape
        frames = self.conv(self.stem(x.reshape(b * t, 1, h, w)).relu()).relu()
        outputs, _ = self.gru(frames.reshape(b, t, -1))
        scores: Tensor = self.head(outputs[:, -1])
        return scores


class Encoder(nn.Module):
    """A class token, and a mask of what only fills the rows up."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(ids.shape[0], -1, -1), self.embedding(ids)], 1)
        mask = F.pad(ids == 0, (1, 0), value=False)
        scores: Tensor = self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])
        return scores


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.bag = nn.EmbeddingBag(11, 6, mode="mean", padding_idx=1)
        self.hidden, self.head = nn.Linear(42, 12), nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.embedding(ids).flatten(1), self.bag(ids)], 1)
        scores: Tensor = self.head(self.hidden(x).relu())
        return scores


class SimpleViT(nn.Module):
    """Positions of sines and cosines that are made in the forward; attention written out."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) * 4**-0.5).softmax(-1)
            y: Tensor = self.out((weights @ v).transpose(1, 2).reshape(b, n, 8))
            return y

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Linear(48, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(
            [nn.ModuleList([self.Attention(), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())])]
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = self.patches(x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 48))
        angles = torch.arange(x.shape[1], device=x.device)[:, None] / 10000 ** (torch.arange(4, device=x.device) / 4)
        x = x + torch.cat([angles.sin(), angles.cos()], 1)
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        scores: Tensor = self.head(self.norm(x).mean(1))
        return scores


# What forwards do.


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.relu_()
        y = self.b(x)
        y += x
        y[:, 0] = 0
        z = self.c(y)
        z.add_(1).mul_(0.5)
        scores: Tensor = self.head(z)
        return scores


class Shares(nn.Module):
    """A block that runs twice, and a weight that runs back transposed, in other partitions."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.middle, self.again, self.head = (nn.Linear(12, size) for size in (12, 12, 12, 4))
        self.again.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.block(x).relu()).relu()
        x = self.again(self.block(x).relu()).relu()
        scores: Tensor = self.head(F.linear(x, self.middle.weight.t()))
        return scores


class Doubled(torch.autograd.Function):
    """Its gradient is not that of its values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign() * 0.5

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() < 1)


class Binary(nn.Module):
    """An autograd function, a lambda, and a tensor that is no buffer, in attributes; lists and dictionaries of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(12, 12) / 3) for _ in range(2)])
        self.factors = nn.ParameterDict({"scale": nn.Parameter(torch.ones(12))})
        self.activation = lambda x: x.relu()
        self.shift = torch.linspace(0, 1, 12)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = self.activation(x @ weight)
        y: Tensor = Doubled.apply(x - 0.5) * self.factors["scale"] + self.shift
        return y


class HalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.to(torch.bfloat16)).to(torch.float32)
        return y


class Spectrum(nn.Module):
    """A spectrogram, and a filter whose real parameters are a spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(8))
        self.filter = nn.Parameter(torch.randn(5, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(x, 8, hop_length=4, window=self.get_buffer("window"), return_complex=True).abs()
        kernel = torch.fft.irfft2(torch.view_as_complex(self.filter))
        return (spectrum.transpose(1, 2) @ kernel).flatten(1)


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 16, 3), nn.MaxPool2d(2, 2)
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(self.pool(F.relu(self.conv1(x)))))
        x = x.view(-1, 16)
        scores: Tensor = self.fc2(F.relu(self.fc1(x)))
        return scores


class TwoInputs(nn.Module):
    """Two inputs packed into one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.middle, self.head = nn.Linear(5, 12), nn.Linear(7, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[:, :5], x[:, 5:]
        scores: Tensor = self.head(self.middle(self.left(left) * self.right(right)).relu())
        return scores


class Features(nn.Module):
    """Random features, which its constructor draws and keeps beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = torch.randn(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.frequencies)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.depth = nn.Linear(12, 12), torchvision.ops.StochasticDepth(0.3, "row")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.depth(self.linear(x).relu())
        return y


# What passes between blocks.


class Pair(NamedTuple):
    x: Tensor
    rest: Tensor | None


@dataclass
class Carried:
    x: Tensor
    skip: Tensor


class Passes(nn.Module):
    """A linear layer whose input and output are of the forms that are named."""

    def __init__(self, takes: str, gives: str) -> None:
        super().__init__()
        self.takes, self.gives, self.linear = takes, gives, nn.Linear(12, 12)

    def forward(self, given: Any) -> Any:
        x = {"tensor": lambda: given, "pair": lambda: given.x, "dict": lambda: given["x"] + given["skip"],
             "carried": lambda: given.x - given.skip}[self.takes]()  # fmt: skip
        y = self.linear(x).relu()
        return {"tensor": lambda: y, "pair": lambda: Pair(y, None), "dict": lambda: {"x": y, "skip": x},
                "carried": lambda: Carried(y, x)}[self.gives]()  # fmt: skip


def passing() -> nn.Module:
    forms = ("tensor", "pair", "tensor", "dict", "tensor", "carried", "tensor")
    return nn.Sequential(*(Passes(*pair) for pair in itertools.pairwise(forms)), nn.Linear(12, 4))


CASES: dict[str, tuple[Callable[[], nn.Module], Data]] = {
    "hooks on modules": (hooked, vectors()),
    "parametrizations": (parametrized, vectors()),
    "norms of weights as before, pruning": (parametrized_as_before, vectors()),
    "lazy modules": (after_a_dry_run, images()),
    "low-rank adapters": (adapted, vectors()),
    "DataParallel": (lambda: nn.DataParallel(small_mlp()), vectors()),
    "LSTM, GRU": (Sequences, vectors()),
    "video": (Video, images()),
    "encoder": (Encoder, TOKENS),
    "EmbeddingBag": (Bags, TOKENS),
    "SimpleViT": (SimpleViT, images()),
    "in place": (InPlace, vectors()),
    "shared and transposed": (Shares, vectors()),
    "functions, lists, lambdas": (lambda: nn.Sequential(nn.Linear(12, 12), Binary(), nn.Linear(12, 4)), vectors()),
    "bf16 inside": (lambda: nn.Sequential(nn.Linear(12, 12), HalfPrecision(), nn.Linear(12, 4)), vectors()),
    "spectra": (lambda: nn.Sequential(nn.Linear(12, 12), Spectrum(), nn.Linear(16, 4)), vectors()),
    "norms of maps, shuffled channels": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), Shuffle(), nn.ReLU(),
            nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ChannelShuffle(2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4),
        ),
        images(),
    ),
    "one and three dimensions": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(),
            nn.Unflatten(1, (2, 2, 2, 5)), nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4),
        ),
        vectors(),
    ),
    "LeNet": (LeNet, images()),
    "two inputs": (TwoInputs, vectors()),
    "stochastic depth": (lambda: nn.Sequential(Dropped(), Dropped(), nn.Linear(12, 4)), vectors()),
    "forms between blocks": (passing, vectors()),
    "random features": (
        lambda: nn.Sequential(nn.Linear(12, 12), Features(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)), vectors(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_model_as_people_write_it_is_same_as_plain_torch(case: str, tmp_path: Path) -> None:
    build, data = CASES[case]
    options = {**COMMON, "partitions": 3}
    expected = train_by_exact(build, data, **options)
    result = fit(build, data, tmp_path / "run", test=data, **options)
    assert len(result.partitions) == 3
    model = loaded(build, result.weights_file)
    assert_same_weights(model, expected.model)
    assert result.train_loss == expected.train_loss
    with torch.no_grad():
        right = expected.model.eval()(data[0]).argmax(1) == data[1]
    assert result.test_accuracy == pytest.approx(float(right.float().mean()), abs=1e-6)

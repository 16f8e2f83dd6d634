"""Opening: what people wrap around a model, and stages of blocks, are looked into; what stays whole says why."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from helpers.networks import FromFunction, assert_cut_anywhere, assert_equal, images, layer_names, vector
from lowmem_pnn.capture.capture import capture


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """A model without containers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Holder(nn.Module):
    """Holds a model, as Lightning's modules do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.2


class Block(nn.Module):
    """A block that is called with more than one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Any, mask: Tensor | None = None) -> Tensor:
        return x + self.q(self.p(x).relu()) * scale


class Stage(nn.Module):
    """Runs its blocks in a loop over its children."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(3):
            self.add_module(f"block{number}", Block())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x, 2.0)
        return x


class Encoder(nn.Module):
    """Makes a mask of its input's size, and hands it to each block of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        batch, width = x.shape
        if width != 4:
            raise ValueError("four features")
        mask = torch.ones(batch, width, device=x.device) * torch.arange(width, device=x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Holder(Net()), ["model.a", "model.b", "model.c"]),
        (nn.Sequential(Normalize(), Net()), ["1.a", "1.b", "1.c"]),
        (Holder(nn.Sequential(Normalize(), Holder(Net()))), ["model.1.model.a", "model.1.model.b", "model.1.model.c"]),
        (nn.Sequential(Stage(), nn.Linear(4, 2)), ["0.block0", "0.block1", "0.block2", "3"]),
        (nn.Sequential(Encoder(), nn.Linear(4, 2)), ["0.blocks.0", "0.blocks.1", "0.blocks.2", "3"]),
    ],
    ids=["holder", "normalised", "twice", "children", "list"],
)
def test_what_holds_most_of_the_weights_is_opened(model: nn.Module, expected: list[str]) -> None:
    chain = capture(model, vector(4))
    assert layer_names(chain) == expected
    assert {len(specs) for specs in chain.boundaries} == {1}
    for batch in (1, 3):
        assert_equal(chain, model, torch.randn(batch, 4))


def test_sizes_but_the_batch_are_known() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        assert x.shape[1] == 3
        batch, channels, height, width = x.shape
        if x.dim() == 4 and x.dtype == torch.float32 and len(x.shape) == x.ndim and isinstance(x, Tensor):
            x = m.a(x)
        for _ in range(height // 4):
            x = x + 1
        if x.shape[-2:] != (8, width) or x.shape[:1].numel() != len(x) or x.numel() < 0:
            raise ValueError(channels)
        noise = torch.zeros(x.size(0), 4, *x.shape[2:], device=x.device)
        x = m.b((x + noise).view(batch, -1)).view(x.size(0), -1, 2).flatten(1)
        return m.c(x.reshape(*x.shape[:-1], x.size(-1)))

    model = FromFunction(forward, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Linear(256, 8), c=nn.Linear(8, 2))
    chain = capture(model, vector(3, 8, 8))
    assert layer_names(chain) == ["a", "b", "c"]
    for batch in (1, 2, 5):
        assert_equal(chain, model, torch.randn(batch, 3, 8, 8))


def test_what_stays_whole_says_why() -> None:
    model = nn.Sequential(
        FromFunction(lambda m, x: m.b(m.a(x)) * (torch.rand(()) + 1), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), nn.Linear(4, 2)
    )
    chain = capture(model, vector(4))
    assert layer_names(chain) == ["0", "1"]
    whole = "whole: its forward draws random numbers that tracing would freeze; 80% of the weights"
    assert [layer.whole for layer in chain.layers] == [whole, ""]


def test_large_blocks_are_opened_and_closed_for_local_losses() -> None:
    with torch.device("meta"):
        chain = capture(torchvision.models.resnet18(), images(32))
    assert layer_names(chain)[-5:] == ["layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2", "fc"]
    assert [len(specs) for specs in chain.boundaries[-6:]] == [1, 2, 1, 2, 1, 1]
    assert chain.between_blocks is not None
    assert layer_names(chain.between_blocks)[-3:] == ["layer4.0", "layer4.1", "fc"]
    assert {len(specs) for specs in chain.between_blocks.boundaries} == {1}


def test_layers_of_an_opened_block_are_the_model() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    x = torch.randn(2, 3, 32, 32)
    chain = capture(model, images(32))
    assert_equal(chain, model, x)
    assert_cut_anywhere(chain, x)
    assert chain.between_blocks is not None
    assert_equal(chain.between_blocks, model, x)

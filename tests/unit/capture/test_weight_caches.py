"""Caches of what a forward computes of weights in eval mode, which the module's own `train()` forgets: as timm's LeViT has them."""

import pytest
import torch
from torch import Tensor, nn

from helpers.networks import assert_equal
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.chain import TensorSpec


class Biased(nn.Module):
    """A layer with biases at places of an index, computed once for all forwards in eval mode."""

    forgets, of_samples = True, False

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bias = nn.Linear(6, 6), nn.Parameter(torch.rand(6))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Biased":
        super().train(mode)
        if mode and self.forgets:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training or "bias" not in self.cache:
            bias = self.bias.flip(0) + (x.mean() if self.of_samples else 0)
            if self.training:
                return self.linear(x) + bias
            self.cache["bias"] = bias
        return self.linear(x) + self.cache["bias"]


def model(kind: type[Biased]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), kind(), kind(), nn.Linear(6, 2))


def test_weights_may_change_between_forwards() -> None:
    own = model(Biased)
    chain = capture(own, TensorSpec((6,), torch.float32))
    assert len(chain.layers) == 4
    for _ in range(2):
        for mode in (True, False):
            assert_equal(chain.train(mode), own.train(mode), torch.rand(3, 6))
        with torch.no_grad():
            for one in (own, *(layer.module for layer in chain.layers)):
                for parameter in one.parameters():
                    parameter.copy_(torch.full_like(parameter, 0.3))
        own.train()
        assert all(not module.cache for layer in chain.layers for module in layer.module.modules() if isinstance(module, Biased))


class Keeps(Biased):
    """Never forgets."""

    forgets = False


class OfSamples(Biased):
    """Keeps what it computed of the first samples that it saw."""

    of_samples = True


@pytest.mark.parametrize("kind", [Keeps, OfSamples])
def test_what_does_not_follow_from_weights_alone_is_refused(kind: type[Biased]) -> None:
    with pytest.raises(
        CaptureError, match=r"module '1' of Sequential leaves a tensor in its attribute 'cache', which its next forward reads"
    ):
        capture(model(kind), TensorSpec((6,), torch.float32))

"""Fingerprints of layers: equal where layers compute the same function, different where any setting differs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.model.precision import Precision
from lowmem_pnn.profiling.fingerprint import layer_fingerprint


def block(width: int, **dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(**dropout))


def chain_of(*layers: nn.Module, shape: tuple[int, ...] = (16,), precision: Precision | None = None) -> Chain:
    return capture(nn.Sequential(*layers), TensorSpec(shape, torch.float32), precision or Precision())


def kinds(chain: Chain) -> list[int]:
    """For each layer the first one with the same fingerprint."""
    first: dict[Any, int] = {}
    return [first.setdefault(layer_fingerprint(layer), number) for number, layer in enumerate(chain.layers)]


class Scaled(nn.Linear):
    """A layer with a setting that no repr shows."""

    def __init__(self, width: int, scale: Any) -> None:
        super().__init__(width, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.scale(x) if callable(self.scale) else self.scale)


def test_layers_of_equal_modules_and_shapes_have_one_fingerprint() -> None:
    chain = chain_of(*(block(16) for _ in range(3)), nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert kinds(chain) == [0, 0, 0, 3, 4, 4]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (block(16, p=0.1), block(16, p=0.2)),
        (nn.Linear(16, 16), nn.Linear(16, 16, bias=False)),
        (nn.Linear(16, 16), Scaled(16, 1.0)),
        (Scaled(16, 1.0), Scaled(16, 2.0)),
        (Scaled(16, 1.0), Scaled(16, 1)),
        (Scaled(16, lambda x: x), Scaled(16, lambda x: x * x)),
        (nn.Linear(16, 16), nn.Linear(16, 16).requires_grad_(False)),
    ],
)
def test_layers_that_differ_in_any_setting_differ_in_fingerprint(one: nn.Module, other: nn.Module) -> None:
    # Something that learns in any case stands before and after.
    chain = chain_of(nn.Linear(8, 16), one, other, nn.Linear(16, 4), shape=(8,))
    assert kinds(chain)[1:3] == [1, 2]


def test_hooks_make_layers_differ() -> None:
    first, second = block(16), block(16)
    second[0].register_forward_hook(lambda module, inputs, output: None)
    assert kinds(chain_of(first, second)) == [0, 1]


def test_a_layer_with_a_head_differs_from_one_without() -> None:
    chain = chain_of(block(16), block(16))
    first, second = chain.layers
    assert layer_fingerprint(first) == layer_fingerprint(second)
    assert layer_fingerprint(first.with_head(nn.Linear(16, 3), 0)) != layer_fingerprint(second)


class Numbered(nn.Linear):
    """A block that knows its number, and may do otherwise by it."""

    def __init__(self, number: int, every: int) -> None:
        super().__init__(16, 16)
        self.layer_idx, self.every = number, every

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.layer_idx % self.every == 1 else 1)


@pytest.mark.parametrize(("every", "expected"), [(10, [0, 1, 0, 0, 4]), (2, [0, 1, 0, 1, 4])])
def test_blocks_may_differ_in_their_number_where_they_do_the_same(every: int, expected: list[int]) -> None:
    assert kinds(chain_of(*(Numbered(number, every) for number in range(4)), nn.Linear(16, 4))) == expected

"""Gradient tiles: the bits of autograd's own sums, chunk after chunk, in the memory of one gradient and a tile."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.engine import gradient_tiles
from lowmem_pnn.engine.gradient_tiles import GradientTiles, tiled_bytes
from lowmem_pnn.memory.storage_tracker import StorageTracker
from lowmem_pnn.model.layer import Layer

WORDS, WIDTH = 1500, 24


class Head(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WORDS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.norm(x))
        return scores


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_tiles, "LEAST_BYTES", 1)
    monkeypatch.setattr(gradient_tiles, "_TILE_BYTES", 1)  # tiles of 256 rows


def head(bias: bool = True) -> Head:
    torch.manual_seed(3)
    return Head(bias)


def go_back(module: nn.Module, rows: int, count: int) -> list[Tensor]:
    """Gradients of all parameters, and of the inputs, after some chunks of rows."""
    generator, of_inputs = torch.Generator().manual_seed(rows), []
    for _ in range(count):
        x = torch.randn(rows, WIDTH, generator=generator).requires_grad_()
        with GradientTiles():
            scores = module(x)
        scores.log_softmax(1)[:, 0].sum().backward()
        assert x.grad is not None
        of_inputs.append(x.grad)
    return [*(parameter.grad for parameter in module.parameters() if parameter.grad is not None), *of_inputs]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_gradients_in_tiles_are_those_of_autograd(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiled = go_back(head(bias), rows, 3)
    monkeypatch.setattr(gradient_tiles, "LEAST_BYTES", 1 << 40)
    whole = go_back(head(bias), rows, 3)
    assert len(tiled) == len(whole) == (7 if bias else 6)
    assert all(torch.equal(one, other) for one, other in zip(tiled, whole, strict=True))


def test_a_second_chunk_needs_a_tile_and_no_second_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak() -> int:
        module = head()
        go_back(module, 2, 1)
        with StorageTracker() as tracker:
            go_back(module, 2, 1)
        return tracker.peak

    own = peak()
    saved = tiled_bytes(Layer("head", head(), ["norm.weight", "norm.bias", "linear.weight", "linear.bias"]))
    assert saved == 4 * (WORDS - 256) * WIDTH
    monkeypatch.setattr(gradient_tiles, "LEAST_BYTES", 1 << 40)
    assert tiled_bytes(Layer("head", head(), ["norm.weight", "norm.bias", "linear.weight", "linear.bias"])) == 0
    assert peak() - own >= saved - 4096


@pytest.mark.parametrize("change", ["hook", "frozen", "autocast"])
def test_what_somebody_looks_at_is_left_to_autograd(change: str) -> None:
    module, seen = head(), []
    if change == "hook":
        module.linear.weight.register_hook(seen.append)
    if change == "frozen":
        module.linear.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        go_back(module, 2, 1)
    assert len(seen) == (change == "hook")
    assert (module.linear.weight.grad is None) == (change == "frozen")

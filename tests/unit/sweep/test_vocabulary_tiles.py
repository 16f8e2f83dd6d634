"""Vocabulary tiles: the loss and the gradients of cross entropy, from some classes at a time."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.memory.storage_tracker import StorageTracker
from lowmem_pnn.sweep.vocabulary_tiles import backward_by_tiles, work_bytes

ROWS, FEATURES, CLASSES = 13, 6, 50


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows, weight, bias = (
        (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)
        for shape in ((ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    )
    return rows, torch.randint(0, CLASSES, (ROWS,), generator=generator), weight, bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tile", [7, 50, 64])
def test_loss_and_gradients_are_those_of_autograd(dtype: torch.dtype, tile: int) -> None:
    for smoothing, with_bias, ignored in itertools.product((0.0, 0.2), (False, True), (-100, 3)):
        rows, targets, weight, bias = problem(dtype)
        targets[2], targets[5:7] = ignored, ignored
        leaves = [rows.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        scores = nn.functional.linear(leaves[0], leaves[1], leaves[2] if with_bias else None)
        expected = nn.functional.cross_entropy(scores, targets, ignore_index=ignored, label_smoothing=smoothing)
        expected.backward()
        gradient, of_weight, of_bias = torch.zeros_like(rows), torch.full_like(weight, math.nan), torch.zeros_like(bias)

        def write(first: int, part: Tensor, of_weight: Tensor = of_weight) -> None:
            of_weight[first : first + len(part)] = part

        loss = backward_by_tiles(
            rows, targets, weight, bias if with_bias else None, tile=tile, ignored=ignored, smoothing=smoothing,
            gradient=gradient, bias_gradient=of_bias if with_bias else None, write=write,
        )  # fmt: skip
        near = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 5e-6}
        torch.testing.assert_close(torch.tensor(loss, dtype=dtype), expected.detach(), **near)
        for own, leaf in zip((gradient, of_weight, of_bias)[: 3 if with_bias else 2], leaves, strict=False):
            torch.testing.assert_close(own, leaf.grad, **near)


def test_where_no_row_counts_the_loss_is_nothing_and_so_are_gradients() -> None:
    rows, targets, weight, _ = problem(torch.float32)
    gradient, tiles = torch.zeros_like(rows), []
    loss = backward_by_tiles(
        rows, torch.full_like(targets, -100), weight, tile=20, ignored=-100, gradient=gradient,
        write=lambda first, part: tiles.append((first, part.clone())),
    )  # fmt: skip
    assert (loss, [first for first, _ in tiles]) == (0.0, [0, 20, 40])
    assert not gradient.any()
    assert not any(part.any() for _, part in tiles)


def test_targets_that_are_no_classes_and_losses_that_are_no_numbers_go_nowhere() -> None:
    rows, targets, weight, _ = problem(torch.float32)
    tiles: list[int] = []
    rows[0, 0] = math.inf
    assert not math.isfinite(
        backward_by_tiles(rows, targets, weight, tile=9, ignored=-100, write=lambda first, _: tiles.append(first))
    )
    assert not tiles
    targets[1] = CLASSES
    with pytest.raises(IndexError, match=f"Target {CLASSES} is out of bounds"):
        backward_by_tiles(rows, targets, weight, tile=9, ignored=-100)


def test_memory_is_what_is_foreseen() -> None:
    rows, weight = torch.randn(512, 64), torch.randn(5000, 64)
    targets, gradient = torch.randint(0, 5000, (512,)), torch.zeros(512, 64)
    with StorageTracker(fake=False) as tracker:
        backward_by_tiles(rows, targets, weight, tile=100, ignored=-100, smoothing=0.1, gradient=gradient, write=lambda *_: None)
    assert tracker.peak <= work_bytes(512, 64, 100)
    assert work_bytes(512, 64, 100) < 1.3 * tracker.peak

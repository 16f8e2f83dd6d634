"""Row gradients and stored gradients: the bits of autograd's matrix, without the matrix."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.model.layer import Layer
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.scratch import Scratch
from lowmem_pnn.sweep.row_gradients import RowGradients, embedding_weights
from lowmem_pnn.sweep.stored_gradients import StoredGradients

WORDS, WIDTH = 40, 12


def micro_batches() -> list[tuple[Tensor, Tensor]]:
    """Ids of which some occur several times, also in one micro-batch, and gradients."""
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randint(0, WORDS, (5, 7), generator=generator), torch.randn(5, 7, WIDTH, generator=generator)) for _ in range(3)
    ]


def rows_of(embedding: nn.Embedding) -> tuple[Tensor, Tensor]:
    rows = RowGradients({id(embedding.weight): "words"})
    for ids, gradient in micro_batches():
        with rows:
            embedding(ids).backward(gradient)
    assert embedding.weight.grad is None
    return rows.take()["words"]


@pytest.mark.parametrize("padding", [None, 3, -2])
def test_rows_have_the_bits_of_a_whole_gradient(padding: int | None) -> None:
    embedding = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
    ids, rows = rows_of(embedding)
    for numbers, gradient in micro_batches():
        embedding(numbers).backward(gradient)
    assert embedding.weight.grad is not None
    assert torch.equal(torch.zeros(WORDS, WIDTH).index_copy(0, ids, rows), embedding.weight.grad)
    assert ids.tolist() == sorted(set(ids.tolist()))


def test_other_weights_and_other_embeddings_are_as_they_were() -> None:
    kept, clipped = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH, scale_grad_by_freq=True)
    rows = RowGradients({id(clipped.weight): "clipped"})
    ids, gradient = micro_batches()[0]
    with rows:
        (kept(ids) + clipped(ids)).backward(gradient)
    assert kept.weight.grad is not None
    assert clipped.weight.grad is not None
    assert not rows.take()
    model = nn.ModuleDict({"kept": kept, "clipped": clipped, "other": nn.Linear(WIDTH, WORDS, bias=False)})
    assert embedding_weights(Layer("x", model, model.state_dict())) == {"kept.weight"}
    model["other"].weight = kept.weight  # type: ignore[assignment]
    assert not embedding_weights(Layer("x", model, model.state_dict()))


@pytest.mark.parametrize("size", [WIDTH * 4, 25, WORDS * WIDTH])
@pytest.mark.parametrize("tiled", [True, False])
def test_slices_are_those_of_tiles_and_rows_together(size: int, tiled: bool, tmp_path: Path) -> None:
    ids, rows = rows_of(nn.Embedding(WORDS, WIDTH))
    whole = torch.zeros(WORDS, WIDTH)
    with Scratch(tmp_path, 0, IoCounter()) as scratch:
        stored = StoredGradients(scratch)
        if tiled:
            whole = torch.randn(WORDS, WIDTH)
            stored.begin_tiles("words", whole.shape)
            for first in range(0, WORDS, 9):
                stored.put_tile("words", first, whole[first : first + 9])
        for half in (slice(0, 10), slice(5, None)):  # of two layers: rows of one number add up
            stored.put_rows("words", whole.shape, ids[half], rows[half])
            whole = whole.index_add(0, ids[half], rows[half])
        slices = [
            stored.elements("words", slice(begin, min(begin + size, whole.numel()))) for begin in range(0, whole.numel(), size)
        ]
        assert torch.equal(torch.cat(slices).view_as(whole), whole)
        assert torch.equal(stored.elements("words"), whole)
        torch.testing.assert_close(stored.norm("words", size), whole.norm())
        assert stored.names == {"words"}
        stored.clear()
        assert not stored.names

"""A slab of pinned memory: pieces never overlap and all come back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_pnn.memory.pinned import PinnedSlab


def slab_of(size: int) -> PinnedSlab:
    return PinnedSlab(lambda size: torch.empty(size, dtype=torch.uint8), size)


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 5)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_pieces_of_the_slab_never_overlap_and_all_come_back(steps: list[tuple[int, int]]) -> None:
    slab, held = slab_of(2048), []
    for number, (size, drop) in enumerate(steps):
        piece = slab.lend((size,), torch.uint8)
        if piece is not None:
            assert piece.data_ptr() % 64 == slab._slab.data_ptr() % 64  # type: ignore[union-attr]
            held.append((piece.fill_(number), number))
        if drop < len(held):
            del held[drop]
        piece = None
        assert all(tensor.eq(value).all() for tensor, value in held)
        assert slab.lent_bytes == sum(-(-max(1, len(tensor)) // 64) * 64 for tensor, _ in held) <= slab.size
    held.clear()
    assert slab.lend((2048,), torch.uint8) is not None, "no hole is left"


def test_the_slab_is_allocated_when_it_is_used_and_given_back_when_nothing_of_it_is() -> None:
    slab = slab_of(1024)
    assert slab.held_bytes == 0
    piece = slab.lend((3, 4), torch.float32, (1, 3))
    assert piece is not None
    assert (piece.shape, piece.stride(), slab.held_bytes) == ((3, 4), (1, 3), 1024)
    view = piece[1]
    del piece
    slab.close()
    assert slab.held_bytes == 1024, "a view holds its piece"
    del view
    slab.close()
    assert slab.held_bytes == 0

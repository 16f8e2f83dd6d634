"""Micro-batches: they cover a batch in order."""

import pytest

from lowmem_pnn.engine.micro_batches import micro_batches


@pytest.mark.parametrize("total", range(1, 12))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("smallest", [1, 2])
def test_micro_batches_cover_a_batch_in_order(total: int, size: int, smallest: int) -> None:
    parts = micro_batches(total, max(size, smallest), smallest)
    assert [number for part in parts for number in range(part.start, part.stop)] == list(range(total))
    sizes = [part.stop - part.start for part in parts]
    assert min(sizes) >= min(smallest, total)
    assert max(sizes) <= max(size, smallest) + smallest - 1

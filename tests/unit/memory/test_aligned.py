"""Tensors in aligned memory: huge pages where they are large, alignment whatever the allocator does."""

import copy
import math
import sys

import pytest
import torch

from lowmem_pnn.memory.aligned import PAGE_BYTES, aligned_empty
from lowmem_pnn.memory.process_meter import private_and_data_bytes
from lowmem_pnn.stores.header import NAME_BY_DTYPE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are Linux's")
@pytest.mark.parametrize("nbytes", [2 << 20, (5 << 20) + 4096, 7_000_001])
def test_large_memory_for_direct_transfers_lies_in_huge_pages_and_counts_for_what_it_is(nbytes: int) -> None:
    # Whatever these need once.
    bool(aligned_empty((nbytes,), torch.uint8, alignment=PAGE_BYTES).fill_(1).all())
    before = private_and_data_bytes()
    tensor = aligned_empty((nbytes,), torch.uint8, alignment=PAGE_BYTES)
    tensor.fill_(1)
    private, data = (now - then for now, then in zip(private_and_data_bytes(), before, strict=True))
    assert tensor.data_ptr() % (2 << 20) == 0
    assert nbytes <= data < nbytes + (1 << 19), "what is mapped around it is no data"
    assert abs(private - nbytes) < 1 << 19
    kept = tensor[nbytes // 2 :].view(-1)
    del tensor
    # Not by their sum: that makes numbers of eight bytes of them, and the heap may keep these.
    assert bool(kept.all()), "a view keeps it"
    del kept
    assert private_and_data_bytes()[1] - before[1] < 1 << 19
    # Last: the heap may keep the memory of a copy.
    tensor = aligned_empty((nbytes,), torch.uint8, alignment=PAGE_BYTES).fill_(1)
    assert torch.equal(copy.deepcopy(tensor), tensor), "its storage is these bytes alone"


@pytest.mark.parametrize("dtype", sorted(NAME_BY_DTYPE, key=str), ids=str)
def test_aligned_empty_is_aligned_even_where_the_allocator_is_not(monkeypatch, dtype):
    empty = torch.empty

    def off_by_eight(shape, *, dtype, pin_memory):
        shape = shape if isinstance(shape, tuple) else (shape,)
        return empty(math.prod(shape) * dtype.itemsize + 8, dtype=torch.uint8)[8:].view(dtype).view(shape)

    monkeypatch.setattr(torch, "empty", off_by_eight)
    for shape in ((), (3,), (5, 7)):
        tensor = aligned_empty(shape, dtype)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_contiguous()

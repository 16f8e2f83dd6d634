"""The scratch store: values, strides, its share of memory."""

from pathlib import Path

import pytest
import torch

from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.scratch import Scratch


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20], ids=["file", "memory"])
def test_a_scratch_store_gives_back_values_and_strides(memory_bytes: int, tmp_path: Path) -> None:
    base = torch.randn(2, 3, 4, 5)
    tensors = [
        base, base.permute(0, 3, 1, 2), base.to(memory_format=torch.channels_last), base[:, 1], base[:, :1].expand(2, 3, 4, 5),
        torch.randn(()), torch.empty(0, 3), torch.arange(6).to(torch.bfloat16), torch.tensor([True, False]),
    ]  # fmt: skip
    with Scratch(tmp_path, memory_bytes, IoCounter()) as scratch:
        scratch.put("all", [*tensors, None])
        *found, nothing = scratch.get("all")
        assert nothing is None
        for one, other in zip(tensors, found, strict=True):
            assert other is not None
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
            # A piece of something larger, or something spread out, comes back dense; all others as they were.
            if one.numel() * one.itemsize == one.untyped_storage().nbytes() and 0 not in one.stride():
                assert one.stride() == other.stride()
        assert not list(tmp_path.iterdir())  # the file has no name


def test_a_scratch_store_keeps_no_more_in_memory_than_its_share_and_uses_room_again(tmp_path: Path) -> None:
    counter = IoCounter()
    scratch = Scratch(tmp_path, 1000, counter)
    for batch in range(5):
        for number in range(10):
            scratch.put(number, [torch.full((100,), float(number + batch))])
        assert scratch.file_bytes == 8 * 400  # two of ten are in memory
        for number in reversed(range(10)):
            (tensor,) = scratch.pop(number)
            assert tensor is not None
            assert tensor.unique().tolist() == [number + batch]
            assert number not in scratch
    assert counter.bytes_written == counter.bytes_read == 5 * 8 * 400
    scratch.close()


def test_what_is_kept_of_a_large_tensor_does_not_hold_it(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, 1 << 20, IoCounter())
    scratch.put("piece", [torch.zeros(1 << 20)[:10]])
    (kept,) = scratch.get("piece")
    assert kept is not None
    assert kept.untyped_storage().nbytes() == 40
    scratch.close()

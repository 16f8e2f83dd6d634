"""Streams: tensors come in order, windows hold, failures surface, and blocks of memory are used again."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmem_pnn.engine.prefetch import Prefetcher, Request, WriteBehind
from lowmem_pnn.errors import DiskError
from lowmem_pnn.memory.pool import MemoryPool
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.scratch import Scratch


class _Disk:
    """Counts the bytes that were read and not taken."""

    def __init__(self) -> None:
        self.ahead = self.most = 0

    def request(self, number: int, nbytes: int) -> Request:
        def read() -> Tensor:
            self.ahead += nbytes
            self.most = max(self.most, self.ahead)
            return torch.full((nbytes,), number % 100, dtype=torch.uint8)

        return Request(nbytes, read)


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_tensors_come_in_order_and_no_more_than_the_window_waits(sizes: list[int], window: int) -> None:
    disk = _Disk()
    with ThreadPoolExecutor(1) as pool:
        ahead = Prefetcher((disk.request(number, size) for number, size in enumerate(sizes)), pool, window)
        for number, size in enumerate(sizes):
            tensor = ahead.take()
            assert tensor.tolist() == [number] * size
            disk.ahead -= size
        ahead.close()
    # Between a tensor's leaving the window and its being counted off here, the next may have been read.
    largest = max((one + other for one, other in pairwise(sizes)), default=max(sizes, default=0))
    assert disk.most <= max(window, max(sizes, default=0)) + largest


def test_a_stream_that_is_closed_reads_no_more(pool: ThreadPoolExecutor) -> None:
    disk = _Disk()
    ahead = Prefetcher((disk.request(number, 10) for number in range(100)), pool, 50)
    ahead.take()
    ahead.close()
    before = disk.most
    pool.submit(int).result()
    assert disk.most == before <= 70


def test_a_failed_read_is_raised_where_its_tensor_is_taken(pool: ThreadPoolExecutor) -> None:
    def fail() -> Tensor:
        raise DiskError("gone")

    ahead = Prefetcher(iter([Request(1, lambda: torch.ones(1)), Request(1, fail)]), pool, 10)
    ahead.take()
    with pytest.raises(DiskError, match="gone"):
        ahead.take()
    ahead.close()


def test_writes_are_done_in_order_and_no_more_than_the_window_waits(pool: ThreadPoolExecutor) -> None:
    behind, written, waiting, most = WriteBehind(pool, 25), [], 0, 0
    lock = threading.Lock()
    for number in range(20):

        def write(number: int = number) -> None:
            nonlocal waiting
            time.sleep(0.002)
            with lock:
                written.append(number)
                waiting -= 10

        with lock:
            waiting += 10
        behind.submit(10, write)
        with lock:
            most = max(most, waiting)
    behind.wait()
    assert written == list(range(20))
    assert most <= 40  # two that wait, the one that is submitted, and one that is done but not yet counted off


def test_a_failed_write_is_raised_by_a_later_one_or_by_the_wait(pool: ThreadPoolExecutor) -> None:
    def fail() -> None:
        raise DiskError("full")

    behind = WriteBehind(pool, 100)
    behind.submit(1, fail)
    with pytest.raises(DiskError, match="full"):
        behind.wait()
    behind.submit(1, fail)
    pool.submit(int).result()
    with pytest.raises(DiskError, match="full"):
        behind.submit(1, lambda: None)
    behind.abandon()
    behind.wait()


def test_blocks_are_used_again_and_never_twice_at_once() -> None:
    pool = MemoryPool(4 << 20)
    first = pool.empty((1 << 20,), torch.uint8).fill_(1)
    second = pool.empty((1 << 18,), torch.float32).fill_(2)
    assert pool.held_bytes == 2 << 20
    view = first[10:20]
    address = first.data_ptr()
    del first
    gc.collect()
    # A view keeps the block.
    third = pool.empty((1 << 20,), torch.uint8).fill_(3)
    assert view.tolist() == [1] * 10
    assert second.unique().tolist() == [2]
    del view
    fourth = pool.empty((1 << 19,), torch.int16)
    assert fourth.data_ptr() == address
    assert third.unique().tolist() == [3]
    assert fourth.data_ptr() % 64 == third.data_ptr() % 64 == 0


def test_free_blocks_stay_within_the_limit() -> None:
    pool = MemoryPool(3 << 20)
    for size in (1 << 20, 2 << 20, 1 << 19, 3 << 20):
        pool.empty((size,), torch.uint8)
        gc.collect()
        assert pool.held_bytes <= 3 << 20
    pool.set_limit(1 << 20)
    assert pool.held_bytes <= 1 << 20
    pool.clear()
    assert pool.held_bytes == 0


def test_a_parameter_holds_its_block_and_small_tensors_take_none() -> None:
    pool = MemoryPool(8 << 20)
    parameter = torch.nn.Parameter(pool.empty((1 << 18,), torch.float32).fill_(5))
    other = pool.empty((1 << 18,), torch.float32).fill_(6)
    assert parameter.unique().tolist() == [5]
    assert other.data_ptr() != parameter.data_ptr()
    assert pool.held_bytes == 2 << 20
    pool.empty((100,), torch.float32)
    assert pool.held_bytes == 2 << 20


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

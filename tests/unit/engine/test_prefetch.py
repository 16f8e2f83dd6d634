"""Prefetch and write-behind: tensors come in order, limits hold, and failures surface."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmem_pnn.engine.prefetch import Prefetcher, Request, WriteBehind
from lowmem_pnn.errors import DiskError


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
def test_tensors_come_in_order_and_no_more_than_the_limit_waits(sizes: list[int], limit: int) -> None:
    disk = _Disk()
    with ThreadPoolExecutor(1) as pool:
        prefetcher = Prefetcher((disk.request(number, size) for number, size in enumerate(sizes)), pool, limit)
        for number, size in enumerate(sizes):
            tensor = prefetcher.take()
            assert tensor.tolist() == [number] * size
            disk.ahead -= size
        prefetcher.close()
    # Between a tensor's being taken and its being counted off here, the next may have been read.
    largest = max((one + other for one, other in pairwise(sizes)), default=max(sizes, default=0))
    assert disk.most <= max(limit, max(sizes, default=0)) + largest


def test_a_tensor_that_is_too_large_to_wait_is_read_when_it_is_taken(pool: ThreadPoolExecutor) -> None:
    disk = _Disk()
    small, large = disk.request(0, 10), disk.request(1, 100)
    prefetcher = Prefetcher(iter([small, Request(100, large.read, early=False), small]), pool, 50)
    prefetcher.start()
    pool.submit(int).result()
    assert disk.ahead == 10
    assert [len(prefetcher.take()) for _ in range(2)] == [10, 100]
    pool.submit(int).result()
    assert disk.ahead == 120  # what comes after it is read ahead again
    assert len(prefetcher.take()) == 10


def test_a_stream_that_is_closed_reads_no_more(pool: ThreadPoolExecutor) -> None:
    disk = _Disk()
    prefetcher = Prefetcher((disk.request(number, 10) for number in range(100)), pool, 50)
    prefetcher.take()
    prefetcher.close()
    before = disk.most
    pool.submit(int).result()
    assert disk.most == before <= 70


def test_a_failed_read_is_raised_where_its_tensor_is_taken(pool: ThreadPoolExecutor) -> None:
    def fail() -> Tensor:
        raise DiskError("gone")

    prefetcher = Prefetcher(iter([Request(1, lambda: torch.ones(1)), Request(1, fail)]), pool, 10)
    prefetcher.take()
    with pytest.raises(DiskError, match="gone"):
        prefetcher.take()
    prefetcher.close()


def test_writes_are_done_in_order_and_no_more_than_the_limit_waits(pool: ThreadPoolExecutor) -> None:
    write_behind, written, waiting, most = WriteBehind(pool, 25), [], 0, 0
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
        write_behind.submit(10, write)
        with lock:
            most = max(most, waiting)
    write_behind.wait()
    assert written == list(range(20))
    assert most <= 40  # two that wait, the one that is submitted, and one that is done but not yet counted off


def test_a_failed_write_is_raised_by_a_later_one_or_by_the_wait(pool: ThreadPoolExecutor) -> None:
    def fail() -> None:
        raise DiskError("full")

    write_behind = WriteBehind(pool, 100)
    write_behind.submit(1, fail)
    with pytest.raises(DiskError, match="full"):
        write_behind.wait()
    write_behind.submit(1, fail)
    pool.submit(int).result()
    with pytest.raises(DiskError, match="full"):
        write_behind.submit(1, lambda: None)
    write_behind.abandon()
    write_behind.wait()

"""The memory pool: blocks are used again, and never twice at once."""

import gc

import torch

from lowmem_pnn.memory.pool import MemoryPool


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


def test_freed_blocks_above_the_limit_go_when_the_pool_is_told_to_keep_to_it() -> None:
    pool = MemoryPool(1 << 20)
    first, second = (pool.empty((1 << 20,), torch.uint8) for _ in range(2))
    address = second.data_ptr()
    del first
    del second
    assert pool._held_bytes == 2 << 20
    pool.keep_to_limit()
    assert pool._held_bytes == 1 << 20
    assert pool.empty((1 << 20,), torch.uint8).data_ptr() == address

"""Prefetch of shards: windows of shards, the cache of a store that fits, memory, and the page cache."""

import gc
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from helpers.activation_stores import PLENTY, SAMPLE_BYTES, label_lists, read, through, write, write_kept
from helpers.pagecache import cached_bytes, watch_transfers
from helpers.tensors import bits
from lowmem_pnn.memory.process_meter import private_bytes
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores import shard_file
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.encoding import ENCODINGS
from lowmem_pnn.stores.shard_file import ShardFile
from lowmem_pnn.stores.tensor_file import IoCounter


def test_a_store_that_fits_is_mixed_as_a_whole_and_read_once(tmp_path, pool):
    counter = IoCounter()
    write(tmp_path / "a", 100, pool, shard_samples=10)
    store = ActivationStore.open(tmp_path / "a", counter=counter)
    before = counter.bytes_read
    epochs = [label_lists(read(store, 100, pool, shuffle=True, epoch=epoch, window_bytes=100 * SAMPLE_BYTES)) for epoch in (0, 1)]
    assert counter.bytes_read - before == store.nbytes
    assert epochs[0] != epochs[1]
    # Neighbours of one shard do not stay together.
    assert len({label // 10 for label in epochs[0][0][:20]}) > 4
    assert store.cache is not None
    store.close()
    assert store.cache is None
    assert label_lists(read(store, 100, pool, shuffle=True, epoch=1)) == epochs[1]


def test_the_cache_goes_when_the_memory_for_it_does(tmp_path, pool):
    write(tmp_path / "a", 20, pool)
    store = ActivationStore.open(tmp_path / "a")
    read(store, 4, pool)
    assert store.cache is not None
    read(store, 4, pool, window_bytes=20 * SAMPLE_BYTES - 1)
    assert store.cache is None


def test_windows_mix_shards_that_are_far_apart(tmp_path, pool):
    write(tmp_path / "a", 400, pool, shard_samples=10)
    store = ActivationStore.open(tmp_path / "a")
    labels = read(store, 400, pool, shuffle=True, window_bytes=80 * SAMPLE_BYTES)[0][1]
    windows = [set((labels[begin : begin + 40] // 10).tolist()) for begin in range(0, 400, 40)]
    assert [len(window) for window in windows] == [4] * 10
    assert any(max(window) - min(window) > 10 for window in windows)
    assert labels[:40].tolist() != sorted(labels[:40].tolist())


def test_batches_are_the_receivers_own(tmp_path, pool):
    tensors, _ = write(tmp_path / "a", 20, pool)
    store = ActivationStore.open(tmp_path / "a")
    for window_bytes in (PLENTY, 0):
        for _ in range(2):
            for (first, second), labels in store.batches(3, shuffle=False, seed=0, epoch=0, window_bytes=window_bytes, pool=pool):
                assert bits(first) == bits(tensors[0][labels])
                first.fill_(7)
                second.fill_(7)
                labels.fill_(7)


def test_what_is_kept_of_a_batch_stays_when_its_memory_would_be_used_again(tmp_path, pool):
    specs = (TensorSpec((1024,), torch.float32),)  # a batch of more than the smallest block that is used again
    (source,), _ = write(tmp_path / "a", 800, pool, specs=specs, shard_samples=50, step=100)
    store = ActivationStore.open(tmp_path / "a")
    kept, addresses = [], []
    for number, ((tensor,), labels) in enumerate(
        store.batches(100, shuffle=True, seed=0, epoch=0, window_bytes=1 << 20, pool=pool)
    ):
        addresses.append(tensor.data_ptr())
        if number % 3 == 0:
            kept.append((tensor[90:, 7:], labels[90:].tolist()))
        del tensor, labels
    assert len(set(addresses)) < len(addresses), "memory is used again"
    for rows, labels in kept:
        assert bits(rows) == bits(source[labels][:, 7:])


def test_skipped_windows_are_not_read(tmp_path, pool):
    counter = IoCounter()
    write(tmp_path / "a", 1000, pool, shard_samples=10)
    store = ActivationStore.open(tmp_path / "a", counter=counter)
    before = counter.bytes_read
    read(store, 10, pool, shuffle=True, window_bytes=20 * SAMPLE_BYTES, start=98)
    assert counter.bytes_read - before == store.nbytes // 50


def test_an_iteration_that_is_left_leaves_nothing_behind(tmp_path, pool, monkeypatch):
    reads, read_image = [], ShardFile.read

    def slowly(self, path, *arguments, **options):
        time.sleep(0.01)
        done = read_image(self, path, *arguments, **options)
        reads.append(path)
        return done

    write(tmp_path / "a", 100, pool)
    store = ActivationStore.open(tmp_path / "a")
    monkeypatch.setattr(ShardFile, "read", slowly)
    iterator = store.batches(3, shuffle=True, seed=0, epoch=0, window_bytes=20 * SAMPLE_BYTES, pool=pool)
    next(iterator)
    iterator.close()
    done = len(reads)
    pool.submit(int).result()
    assert len(reads) == done, "nothing reads on"


def test_two_iterations_at_once(tmp_path, pool):
    write(tmp_path / "a", 50, pool)
    store = ActivationStore.open(tmp_path / "a")
    options = {"seed": 0, "epoch": 0, "window_bytes": 20 * SAMPLE_BYTES, "pool": pool}
    pairs = list(zip(store.batches(5, shuffle=True, **options), store.batches(5, shuffle=False, **options), strict=True))
    assert label_lists(pair[1] for pair in pairs) == [list(range(begin, begin + 5)) for begin in range(0, 50, 5)]
    assert sorted(label for pair in pairs for label in pair[0][1].tolist()) == list(range(50))


def test_memory_stays_within_windows_and_a_batch(tmp_path, pool):
    specs = (TensorSpec((65536,), torch.float32),)  # 256 KiB a sample
    window_bytes, batch_bytes, slack = 16 << 20, 4 << 20, 6 << 20
    gc.collect()
    with ActivationWriter(tmp_path / "a", specs, 320, 4 << 20, pool) as writer:
        before, peak = private_bytes(), 0
        tensor, labels = torch.ones(8, 65536), torch.zeros(8, dtype=torch.int64)
        for _ in range(40):
            writer.append((tensor,), labels)
            peak = max(peak, private_bytes() - before)
    assert writer.shard_samples == 15
    assert peak < 2 * (4 << 20) + tensor.nbytes + slack
    store = ActivationStore.open(tmp_path / "a")
    assert store.nbytes > 80 << 20
    before, peak = private_bytes(), 0
    for (tensor,), _ in store.batches(16, shuffle=True, seed=0, epoch=0, window_bytes=window_bytes, pool=pool):
        assert tensor[0, 0] == 1
        peak = max(peak, private_bytes() - before)
        del tensor, _
    assert peak < window_bytes + batch_bytes + slack


@pytest.mark.parametrize("available", [1 << 40, 1 << 10])
def test_only_stores_that_outgrow_memory_are_read_past_the_page_cache(tmp_path, pool, monkeypatch, available):
    write(tmp_path / "a", 20, pool)
    asked, read_image = [], ShardFile.read
    monkeypatch.setattr(
        ShardFile, "read", lambda self, *args, direct: asked.append(direct) or read_image(self, *args, direct=direct)
    )
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    read(ActivationStore.open(tmp_path / "a"), 20, pool)
    assert asked == [available == 1 << 10] * 5


PAGED_SPECS = (TensorSpec((16, 32), torch.float32), TensorSpec((7,), torch.int16))


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_large_shards_come_back_past_the_page_cache_and_without_it(tmp_path, pool, monkeypatch, refused, encoding, shuffle):
    if refused:
        monkeypatch.setattr(shard_file, "open_direct", lambda *_, **__: None)
    moved = watch_transfers(monkeypatch)
    # Shards of 350 samples fill pages, the last one does not, and lies in the middle of a window when they are shuffled.
    tensors, sample_bytes = write_kept(tmp_path / "a", PAGED_SPECS, 1000, encoding, pool, shard_samples=350, step=64)
    store = ActivationStore.open(tmp_path / "a", verify=True, direct=True)
    assert store.shard_samples % 2 == 0
    batches = read(store, 48, pool, shuffle=shuffle, window_bytes=1500 * sample_bytes)
    order = torch.cat([labels for _, labels in batches])
    assert sorted(order.tolist()) == list(range(1000))
    for number, source in enumerate(tensors):
        assert bits(torch.cat([given[number] for given, _ in batches])) == bits(through(source, encoding)[order])
    assert bool(moved["write"]) == bool(moved["read"]) == (not refused and encoding != "int8")


def test_a_store_leaves_the_page_cache_as_it_is(tmp_path, pool, monkeypatch):
    moved = watch_transfers(monkeypatch)
    specs = (TensorSpec((64, 64), torch.float32),)
    write_kept(tmp_path / "a", specs, 512, "float32", pool, shard_samples=64)
    read(ActivationStore.open(tmp_path / "a", direct=True), 32, pool, shuffle=True, window_bytes=256 * specs[0].sample_bytes)
    if not moved["write"]:
        pytest.skip("the file system takes no direct transfers")
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(shards) == 8
    # Opening the store looks at headers, and the kernel reads a little further.
    assert sum(map(cached_bytes, shards)) <= 8 * (64 << 10) < sum(shard.stat().st_size for shard in shards) / 10

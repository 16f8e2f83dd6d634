"""Tests of the store of boundary activations: what was appended comes back; order; damage; memory."""

import errno
import gc
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pagecache import cached_bytes, watch_transfers
from lowmem_pnn.errors import CheckpointError, DiskError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores import activation_writer, shard_file
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.encoding import ENCODINGS, OverflowFault, decode, encode, encoded_bytes, encoded_layout
from lowmem_pnn.stores.header import NAME_BY_DTYPE
from lowmem_pnn.stores.shard_file import ShardFile
from lowmem_pnn.stores.shard_layout import resident_bytes, samples_per_shard
from lowmem_pnn.stores.tensor_file import IoCounter, TensorFile, memory_of

SPECS = (TensorSpec((3,), torch.float32), TensorSpec((2, 2), torch.bfloat16))
SAMPLE_BYTES = 12 + 8 + 8 + 24  # two tensors, the label, the sample's part of a window's order
PLENTY = 1 << 40
GOLDEN_WHOLE = [[9, 8, 2, 1, 11, 3, 4, 7, 5, 6, 0, 10]]
GOLDEN_WINDOWS = [[9, 4, 8, 5, 11, 1, 0, 10, 6, 7, 3, 2]]


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def samples(specs, count, seed=0):
    """Random bits; the labels number the samples."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in specs:
        raw = torch.randint(256, (count * spec.sample_bytes,), generator=generator, dtype=torch.uint8)
        raw = raw % 2 if spec.dtype == torch.bool else raw
        tensors.append(raw.view(spec.dtype).view(count, *spec.shape))
    return tuple(tensors), torch.arange(count)


def write(folder, count, pool, *, specs=SPECS, shard_samples=4, counter=None, step=3):
    tensors, labels = samples(specs, count)
    sample_bytes = sum(spec.sample_bytes for spec in specs) + 8 + 24
    with ActivationWriter(folder, specs, count, shard_samples * sample_bytes, pool, counter) as writer:
        for begin in range(0, count, step):
            writer.append(tuple(tensor[begin : begin + step] for tensor in tensors), labels[begin : begin + step])
    return tensors, labels


def read(store, batch_size, pool, **options):
    options = {"shuffle": False, "seed": 0, "epoch": 0, "window_bytes": PLENTY, **options}
    return list(store.batches(batch_size, pool=pool, **options))


def label_lists(batches):
    return [labels.tolist() for _, labels in batches]


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), memory_of(tensor.contiguous()).tobytes()


@given(
    kinds=st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=3).map(tuple), st.sampled_from(sorted(NAME_BY_DTYPE, key=str))),
        min_size=1,
        max_size=3,
    ),
    count=st.integers(1, 30),
    shard_samples=st.integers(1, 12),
    step=st.integers(1, 13),
    batch_size=st.integers(1, 13),
    window_samples=st.integers(0, 40),
    shuffle=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_every_sample_comes_back_once_bit_for_bit(pool, kinds, count, shard_samples, step, batch_size, window_samples, shuffle):
    specs = tuple(TensorSpec(shape, dtype) for shape, dtype in kinds)
    with tempfile.TemporaryDirectory() as folder:
        tensors, _ = write(Path(folder) / "a", count, pool, specs=specs, shard_samples=shard_samples, step=step)
        store = ActivationStore.open(Path(folder) / "a", verify=True)
        assert store.specs == specs
        assert store.num_samples == count
        assert store.shard_samples == min(count, shard_samples)
        assert store.nbytes == sum(path.stat().st_size for path in (Path(folder) / "a").glob("*.safetensors"))
        window_bytes = window_samples * (sum(spec.sample_bytes for spec in specs) + 32)
        batches = read(store, batch_size, pool, shuffle=shuffle, window_bytes=window_bytes)
    sizes = [len(labels) for _, labels in batches]
    assert sizes == [batch_size] * (count // batch_size) + [count % batch_size] * (count % batch_size > 0)
    order = [label for labels in label_lists(batches) for label in labels]
    assert sorted(order) == list(range(count))
    assert shuffle or order == list(range(count))
    for given_tensors, labels in batches:
        assert labels.dtype == torch.int64
        for tensor, source in zip(given_tensors, tensors, strict=True):
            assert bits(tensor) == bits(torch.stack([source.view(count, -1)[k] for k in labels.tolist()]).view(tensor.shape))
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 64 == 0


def write_kept(folder, specs, count, encoding, pool, *, shard_samples=4, step=3, seed=0):
    """Floats that are finite, beside random bits; the labels number the samples."""
    tensors, labels = samples(specs, count, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = tuple(
        torch.randn(tensor.shape, generator=generator).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for tensor in tensors
    )
    sample_bytes = resident_bytes(specs, 1, (), encoding)
    with ActivationWriter(folder, specs, count, shard_samples * sample_bytes, pool, encoding=encoding) as writer:
        for begin in range(0, count, step):
            writer.append(tuple(tensor[begin : begin + step] for tensor in tensors), labels[begin : begin + step])
    return tensors, sample_bytes


def through(tensor, encoding):
    kept = [
        torch.empty(len(tensor), *shape, dtype=dtype)
        for dtype, shape in encoded_layout(TensorSpec(tuple(tensor.shape[1:]), tensor.dtype), encoding)
    ]
    encode(tensor, kept)
    result = torch.empty_like(tensor)
    decode(kept, result)
    return result


KEPT_SPECS = (
    TensorSpec((3, 4, 4), torch.float32), TensorSpec((2,), torch.int64), TensorSpec((5,), torch.float32),
    TensorSpec((6,), torch.bool), TensorSpec((2, 20), torch.bfloat16), TensorSpec((), torch.float32),
)  # fmt: skip


@given(
    encoding=st.sampled_from(ENCODINGS),
    specs=st.lists(st.sampled_from(KEPT_SPECS), min_size=1, max_size=3),
    count=st.integers(1, 30),
    shard_samples=st.integers(1, 12),
    step=st.integers(1, 13),
    batch_size=st.integers(1, 13),
    window_samples=st.integers(0, 40),
    shuffle=st.booleans(),
    chunk=st.sampled_from([1, 300, 1 << 18]),
)
@settings(deadline=None, max_examples=100)
def test_what_is_kept_in_a_smaller_form_comes_back_in_its_own_type(
    pool, encoding, specs, count, shard_samples, step, batch_size, window_samples, shuffle, chunk
):
    specs = tuple(specs)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_prefetch, "CHUNK_BYTES", chunk)
        tensors, sample_bytes = write_kept(
            Path(folder) / "a", specs, count, encoding, pool, shard_samples=shard_samples, step=step
        )
        store = ActivationStore.open(Path(folder) / "a", verify=True)
        assert (store.specs, store.encoding, store.shard_samples) == (specs, encoding, min(count, shard_samples))
        batches = read(store, batch_size, pool, shuffle=shuffle, window_bytes=window_samples * sample_bytes)
    expected = [through(tensor, encoding) for tensor in tensors]
    order = [label for labels in label_lists(batches) for label in labels]
    assert sorted(order) == list(range(count))
    assert shuffle or order == list(range(count))
    for given_tensors, labels in batches:
        for tensor, source in zip(given_tensors, expected, strict=True):
            assert bits(tensor) == bits(source[labels])
            assert tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize(("encoding", "share"), [("float32", 1), ("bfloat16", 2), ("float16", 2), ("int8", 3.97)])
def test_shards_and_windows_hold_the_small_form(tmp_path, pool, encoding, share):
    specs = (TensorSpec((8, 32, 32), torch.float32),)
    write_kept(tmp_path / "a", specs, 20, encoding, pool)
    store = ActivationStore.open(tmp_path / "a")
    full = 20 * specs[0].sample_bytes
    headers = 5 * 4096
    assert store.nbytes - headers == pytest.approx(full / share, rel=0.02)
    assert store.nbytes == headers + 20 * (encoded_bytes(specs[0], encoding) + 8)
    read(store, 5, pool)
    assert sum(tensor.nbytes for tensor in store.cache) == pytest.approx(full / share, rel=0.01)


def test_the_writer_holds_the_small_form_of_what_waits(tmp_path, monkeypatch):
    made, allocate = [], activation_writer.allocate_as_in_file
    monkeypatch.setattr(activation_writer, "allocate_as_in_file", lambda *args: made.append(allocate(*args)) or made[-1])
    specs = (TensorSpec((64,), torch.float32),)
    with ThreadPoolExecutor(1) as pool:
        write_kept(tmp_path / "a", specs, 12, "int8", pool)
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in made[0]] == [
        (torch.int8, (4, 64)), (torch.float32, (4, 1)), (torch.int64, (4,)),
    ]  # fmt: skip


def test_default_shards_are_those_of_earlier_versions(tmp_path, pool):
    write(tmp_path / "a", 5, pool)
    with TensorFile.open(tmp_path / "a" / "00000.safetensors") as file:
        assert list(file.entries) == ["0", "1", "labels"]
    path = tmp_path / "a" / "index.json"
    content = json.loads(path.read_text())
    assert content.pop("kept_as") == "float32"
    path.write_text(json.dumps(content))
    assert ActivationStore.open(tmp_path / "a", verify=True).encoding == "float32"


def test_scales_are_in_the_checksum_and_their_absence_is_noticed(tmp_path, pool):
    specs = (TensorSpec((4, 16), torch.float32),)
    for folder in "ab":
        write_kept(tmp_path / folder, specs, 8, "int8", pool)
    shard = tmp_path / "a" / "00001.safetensors"
    with TensorFile.open(shard, writable=True) as file:
        scales = file.read("0.scales")
        file.write_from("0.scales", scales * 2)
    ActivationStore.open(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"a/00001\.safetensors' has CRC-32"):
        ActivationStore.open(tmp_path / "a", verify=True)
    path = tmp_path / "b" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kept_as": "bfloat16"}))
    text = r"holds int8 \(4, 4, 16\), float32 \(4, 4\), int64 \(4,\), the index says bfloat16 \(4, 4, 16\), int64 \(4,\);"
    with pytest.raises(CheckpointError, match=text):
        ActivationStore.open(tmp_path / "b")


def test_a_value_that_cannot_be_kept_leaves_no_index(tmp_path, pool):
    specs = (TensorSpec((2,), torch.float32),)
    with (
        pytest.raises(OverflowFault, match=r"1e\+06 is beyond 65504"),
        ActivationWriter(tmp_path / "a", specs, 2, 1000, pool, encoding="float16") as writer,
    ):
        writer.append((torch.tensor([[1.0, 2.0], [3.0, 1e6]]),), torch.zeros(2, dtype=torch.int64))
    assert not (tmp_path / "a" / "index.json").exists()


def write_labelled(folder, count, label_shape, pool, *, shard_samples=4, step=3):
    """Samples that hold their number, with labels that follow from it."""
    numbers = torch.arange(count)
    size = math.prod(label_shape)
    labels = (numbers[:, None] * size + torch.arange(size)).reshape(count, *label_shape)
    specs = (TensorSpec((), torch.float32),)
    sample_bytes = resident_bytes(specs, 1, label_shape)
    with ActivationWriter(folder, specs, count, shard_samples * sample_bytes, pool, label_shape=label_shape) as writer:
        for begin in range(0, count, step):
            writer.append((numbers[begin : begin + step].float(),), labels[begin : begin + step])
    return labels, sample_bytes


@given(
    label_shape=st.lists(st.integers(0, 4), max_size=2).map(tuple),
    count=st.integers(1, 30),
    shard_samples=st.integers(1, 12),
    step=st.integers(1, 13),
    batch_size=st.integers(1, 13),
    window_samples=st.integers(0, 40),
    shuffle=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_labels_of_any_shape_follow_their_samples(
    pool, label_shape, count, shard_samples, step, batch_size, window_samples, shuffle
):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "a"
        labels, sample_bytes = write_labelled(folder, count, label_shape, pool, shard_samples=shard_samples, step=step)
        store = ActivationStore.open(folder, verify=True)
        assert store.label_shape == label_shape
        assert store.shard_samples == min(count, shard_samples)
        batches = read(store, batch_size, pool, shuffle=shuffle, window_bytes=window_samples * sample_bytes)
    order = torch.cat([tensor for (tensor,), _ in batches]).long()
    assert sorted(order.tolist()) == list(range(count))
    assert shuffle or order.tolist() == list(range(count))
    for (tensor,), found in batches:
        assert bits(found) == bits(labels[tensor.long()])
        assert found.is_contiguous()
        assert found.data_ptr() % 64 == 0


def test_the_order_does_not_depend_on_the_labels_shape(tmp_path, pool):
    write(tmp_path / "a", 12, pool, shard_samples=2)
    _, sample_bytes = write_labelled(tmp_path / "b", 12, (5,), pool, shard_samples=2)
    [(_, plain)] = read(ActivationStore.open(tmp_path / "a"), 12, pool, shuffle=True, window_bytes=8 * SAMPLE_BYTES)
    [((numbers,), _)] = read(ActivationStore.open(tmp_path / "b"), 12, pool, shuffle=True, window_bytes=8 * sample_bytes)
    assert numbers.tolist() == plain.tolist()


def test_memory_for_labels_is_counted(tmp_path, pool):
    specs = (TensorSpec((3,), torch.float32),)
    assert resident_bytes(specs, 10, (16,)) - resident_bytes(specs, 10) == 10 * 15 * 8
    # As the specs alone would have it, ten samples would go into a shard and into a window.
    with ActivationWriter(tmp_path / "a", specs, 20, resident_bytes(specs, 10), pool, label_shape=(1000,)) as writer:
        writer.append((torch.zeros(20, 3),), torch.zeros(20, 1000, dtype=torch.int64))
    assert writer.shard_samples == 1
    store = ActivationStore.open(tmp_path / "a")
    read(store, 5, pool, window_bytes=resident_bytes(specs, 20, (1000,)) - 1)
    assert store.cache is None
    read(store, 5, pool, window_bytes=resident_bytes(specs, 20, (1000,)))
    assert store.cache is not None


def test_labels_of_another_shape_are_refused(tmp_path, pool):
    writer = ActivationWriter(tmp_path / "a", (TensorSpec((), torch.float32),), 8, 1, pool, label_shape=(3,))
    for labels in (torch.zeros(4).long(), torch.zeros(4, 2).long(), torch.zeros(4, 3)):
        with pytest.raises(CheckpointError, match=r"takes float32 \(4,\), int64 \(4, 3\), got float32 \(4,\), "):
            writer.append((torch.zeros(4),), labels)
    writer.abort()


def test_an_index_of_an_earlier_version_is_of_single_labels(tmp_path, pool):
    write(tmp_path / "a", 20, pool)
    path = tmp_path / "a" / "index.json"
    content = json.loads(path.read_text())
    del content["label_shape"]
    path.write_text(json.dumps(content))
    store = ActivationStore.open(tmp_path / "a", verify=True)
    assert store.label_shape == ()
    assert label_lists(read(store, 20, pool)) == [list(range(20))]
    write_labelled(tmp_path / "b", 20, (5,), pool)
    path = tmp_path / "b" / "index.json"
    content = json.loads(path.read_text())
    del content["label_shape"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"holds float32 \(4,\), int64 \(4, 5\), the index says float32 \(4,\), int64 \(4,\);"
    ):
        ActivationStore.open(tmp_path / "b")


@given(
    count=st.integers(1, 40),
    shard_samples=st.integers(1, 9),
    batch_size=st.integers(1, 11),
    window_samples=st.integers(0, 50),
    start=st.integers(0, 45),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_start_gives_the_same_tail(pool, count, shard_samples, batch_size, window_samples, start, shuffle, drop_last):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "a", count, pool, shard_samples=shard_samples)
        store = ActivationStore.open(Path(folder) / "a")
        options = {"shuffle": shuffle, "epoch": 3, "window_bytes": window_samples * SAMPLE_BYTES, "drop_last": drop_last}
        whole = read(store, batch_size, pool, **options)
        tail = read(store, batch_size, pool, start=start, **options)
    assert len(whole) == (count // batch_size if drop_last else -(-count // batch_size))
    assert label_lists(tail) == label_lists(whole)[start:]
    for (tensors, _), (expected, _) in zip(tail, whole[start:], strict=True):
        assert [bits(tensor) for tensor in tensors] == [bits(tensor) for tensor in expected]


@pytest.mark.parametrize("window_bytes", [0, 16 * SAMPLE_BYTES, PLENTY])
def test_the_order_is_a_function_of_seed_and_epoch(tmp_path, pool, window_bytes):
    write(tmp_path / "a", 60, pool)
    write(tmp_path / "b", 60, pool)

    def order(folder, seed, epoch):
        store = ActivationStore.open(tmp_path / folder)
        return label_lists(read(store, 7, pool, shuffle=True, seed=seed, epoch=epoch, window_bytes=window_bytes))

    first = order("a", 0, 0)
    torch.manual_seed(5)
    assert order("b", 0, 0) == first
    others = [order("a", 0, 1), order("a", 1, 0), order("a", 1, 1), label_lists([(None, torch.arange(60))])]
    assert all(others[k] not in [first, *others[:k]] for k in range(len(others)))


def test_the_cache_changes_no_order(tmp_path, pool):
    write(tmp_path / "a", 30, pool)
    store = ActivationStore.open(tmp_path / "a")
    epochs = [label_lists(read(store, 4, pool, shuffle=True, epoch=epoch)) for epoch in range(3)]
    fresh = ActivationStore.open(tmp_path / "a")
    assert label_lists(read(fresh, 4, pool, shuffle=True, epoch=2)) == epochs[2]
    assert len({str(epoch) for epoch in epochs}) == 3


def test_the_order_stays_that_of_earlier_versions(tmp_path, pool):
    # A run that is resumed by a later version goes on in the same order.
    write(tmp_path / "a", 12, pool, shard_samples=2)
    store = ActivationStore.open(tmp_path / "a")
    assert label_lists(read(store, 12, pool, shuffle=True, seed=1, epoch=2)) == GOLDEN_WHOLE
    windows = read(store, 12, pool, shuffle=True, seed=1, epoch=2, window_bytes=8 * SAMPLE_BYTES)
    assert label_lists(windows) == GOLDEN_WINDOWS


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
    def anonymous():
        return psutil.Process().memory_full_info().uss

    specs = (TensorSpec((65536,), torch.float32),)  # 256 KiB a sample
    window_bytes, batch_bytes, slack = 16 << 20, 4 << 20, 6 << 20
    gc.collect()
    with ActivationWriter(tmp_path / "a", specs, 320, 4 << 20, pool) as writer:
        before, peak = anonymous(), 0
        tensor, labels = torch.ones(8, 65536), torch.zeros(8, dtype=torch.int64)
        for _ in range(40):
            writer.append((tensor,), labels)
            peak = max(peak, anonymous() - before)
    assert writer.shard_samples == 15
    assert peak < 2 * (4 << 20) + tensor.nbytes + slack
    store = ActivationStore.open(tmp_path / "a")
    assert store.nbytes > 80 << 20
    before, peak = anonymous(), 0
    for (tensor,), _ in store.batches(16, shuffle=True, seed=0, epoch=0, window_bytes=window_bytes, pool=pool):
        assert tensor[0, 0] == 1
        peak = max(peak, anonymous() - before)
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


def test_shards_laid_out_by_others_are_read(tmp_path, pool):
    tensors, labels = samples(SPECS, 20)
    write(tmp_path / "a", 20, pool)
    index = tmp_path / "a" / "index.json"
    content = json.loads(index.read_text())
    for number, shard in enumerate(content["shards"]):
        path = tmp_path / "a" / shard["file"]
        safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"shard": str(number)})
        del shard["crc32"]
        shard |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    index.write_text(json.dumps({**content, "format": 1}))
    for direct in (False, True):
        [(back, found)] = read(ActivationStore.open(tmp_path / "a", verify=True, direct=direct), 20, pool)
        assert found.tolist() == labels.tolist()
        assert [bits(tensor) for tensor in back] == [bits(tensor) for tensor in tensors]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"a/00004\.safetensors' has sha256 [0-9a-f]{64}, the index says"):
        ActivationStore.open(tmp_path / "a", verify=True)


@pytest.mark.parametrize(("sample_bytes", "samples_that_fit", "expected"), [
    (65536, 63, 63), (12544, 334, 320), (12544, 60, 60), (12, 4095, 4095), (12, 4096, 4096), (12, 5000, 4096), (4096, 1, 1),
])  # fmt: skip
def test_shards_fill_whole_pages_where_that_costs_little(sample_bytes, samples_that_fit, expected):
    specs = (TensorSpec((sample_bytes,), torch.uint8),)
    shard_bytes = samples_that_fit * resident_bytes(specs, 1)
    assert samples_per_shard(specs, 1 << 20, shard_bytes) == expected
    assert samples_per_shard(specs, 60, shard_bytes) == min(60, samples_that_fit), "a single shard is as it is"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tensors_on_the_gpu_are_appended(tmp_path, pool):
    tensors, labels = samples(SPECS, 20)
    with ActivationWriter(tmp_path / "a", SPECS, 20, 4 * SAMPLE_BYTES, pool) as writer:
        writer.append(tuple(tensor.cuda() for tensor in tensors), labels)
    [(back, _)] = read(ActivationStore.open(tmp_path / "a"), 20, pool)
    assert [bits(tensor) for tensor in back] == [bits(tensor) for tensor in tensors]


def test_the_writer_holds_at_most_two_shards_and_goes_on_while_one_is_written(tmp_path, monkeypatch):
    release, alive = threading.Event(), []
    allocate = activation_writer.allocate_as_in_file
    monkeypatch.setattr(activation_writer, "allocate_as_in_file", lambda *args: alive.append(allocate(*args)) or alive[-1])
    tensors, labels = samples(SPECS, 12)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(release.wait)
        writer = ActivationWriter(tmp_path / "a", SPECS, 12, 4 * SAMPLE_BYTES, pool)
        # The first shard waits in the pool; the second one fills, and then stands in the way.
        writer.append(tuple(tensor[:7] for tensor in tensors), labels[:7])
        assert (tmp_path / "a" / "00000.safetensors").stat().st_size == 0
        release.set()
        writer.append(tuple(tensor[7:] for tensor in tensors), labels[7:])
        writer.close()
        assert len(alive) == 2
        assert label_lists(read(ActivationStore.open(tmp_path / "a"), 12, pool)) == [list(range(12))]


def test_appended_tensors_may_be_reused_and_may_require_grad(tmp_path, pool):
    specs = (TensorSpec((2,), torch.float32),)
    tensor, labels = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, dtype=torch.int64)
    with ActivationWriter(tmp_path / "a", specs, 6, 1, pool) as writer:
        for step in range(3):
            with torch.no_grad():
                tensor.fill_(step)
            writer.append((tensor * 1,), labels)
    [((back,), _)] = read(ActivationStore.open(tmp_path / "a"), 6, pool)
    assert back[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert not back.requires_grad


def test_bytes_are_counted(tmp_path, pool):
    counter = IoCounter()
    write(tmp_path / "a", 20, pool, counter=counter)
    store = ActivationStore.open(tmp_path / "a")
    assert counter.bytes_written == store.nbytes
    assert counter.bytes_read == 0, "nothing is read back for the checksums"


def test_an_exception_leaves_no_index(tmp_path, pool):
    class Interruption(Exception):
        pass

    def interrupted():
        with ActivationWriter(tmp_path / "a", SPECS, 20, 4 * SAMPLE_BYTES, pool) as writer:
            writer.append(*samples(SPECS, 20))
            raise Interruption

    with pytest.raises(Interruption):
        interrupted()
    assert not (tmp_path / "a" / "index.json").exists()
    text = r"a/index\.json' is missing: the store was not completed; restore the run.s folder from a copy"
    with pytest.raises(CheckpointError, match=text):
        ActivationStore.open(tmp_path / "a")
    # The next writer finds an empty folder.
    write(tmp_path / "a", 5, pool)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["00000.safetensors", "00001.safetensors", "index.json"]
    assert ActivationStore.open(tmp_path / "a", verify=True).num_samples == 5


def test_an_unfinished_store_gets_no_index(tmp_path, pool):
    tensors, labels = samples(SPECS, 5)
    with (
        pytest.raises(CheckpointError, match=r"a' got 5 of 6 samples; append them all before the end"),
        ActivationWriter(tmp_path / "a", SPECS, 6, 1, pool) as writer,
    ):
        writer.append(tensors, labels)
    assert not (tmp_path / "a" / "index.json").exists()


def test_a_full_disk_leaves_no_index(tmp_path, pool, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    tensors, labels = samples(SPECS, 12)
    writer = ActivationWriter(tmp_path / "a", SPECS, 24, 4 * SAMPLE_BYTES, pool)
    writer.append(tensors, labels)
    monkeypatch.setattr(os, "pwritev", full)
    for _ in range(2):
        with pytest.raises(DiskError, match=r"cannot write .*: no space left on device, .* are left"):
            writer.append(tensors, labels)
    monkeypatch.undo()
    with pytest.raises(DiskError, match="no space left on device"):
        writer.close()
    assert not (tmp_path / "a" / "index.json").exists()


def test_a_failed_sync_leaves_no_index(tmp_path, pool, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match="cannot sync it: input/output error"):
        write(tmp_path / "a", 12, pool)
    assert not (tmp_path / "a" / "index.json").exists()


def test_nothing_is_synced_while_samples_are_appended(tmp_path, pool, monkeypatch):
    tensors, labels = samples(SPECS, 20)
    with ActivationWriter(tmp_path / "a", SPECS, 20, 4 * SAMPLE_BYTES, pool) as writer, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: pytest.fail("the drive was waited for"))
        writer.append(tensors, labels)
        pool.submit(int).result()
    assert ActivationStore.open(tmp_path / "a", verify=True).num_samples == 20


@pytest.mark.parametrize("max_unsynced", [1, 10, 128])
def test_shards_are_synced_before_the_index(tmp_path, pool, monkeypatch, max_unsynced):
    monkeypatch.setattr(activation_writer, "_MAX_UNSYNCED", max_unsynced)
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write(tmp_path / "a", 80, pool)
    shards = [f"{number:05d}.safetensors" for number in range(20)]
    assert synced[:22] == [*shards, "a", "index.json.new"]
    assert set(synced[22:]) == {"a", tmp_path.name}


def test_what_does_not_fit_the_specs_is_refused(tmp_path, pool):
    (first, second), labels = samples(SPECS, 4)
    writer = ActivationWriter(tmp_path / "a", SPECS, 6, 1, pool)
    text = "takes float32 (4, 3), bfloat16 (4, 2, 2), int64 (4,), got "
    for tensors in ((first,), (first.double(), second), (first[:3], second), (first, second[:, :1])):
        with pytest.raises(CheckpointError, match=re.escape(text)):
            writer.append(tensors, labels)
    with pytest.raises(CheckpointError, match=re.escape("got float32 (4, 3), bfloat16 (4, 2, 2), int32 (4,);")):
        writer.append((first, second), labels.int())
    writer.append((first, second), labels)
    with pytest.raises(CheckpointError, match=r"a' got 8 samples, 6 were announced; append each sample once"):
        writer.append((first, second), labels)
    writer.abort()


def test_other_files_are_never_deleted(tmp_path, pool):
    write(tmp_path / "a", 5, pool)
    with pytest.raises(CheckpointError, match=r"a' holds a complete store already; delete it, or write to another folder"):
        ActivationWriter(tmp_path / "a", SPECS, 5, 1, pool)
    assert ActivationStore.open(tmp_path / "a", verify=True).num_samples == 5
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "00000.safetensors").touch()
    (tmp_path / "b" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match=r"b' holds 'thesis\.txt', which is no part of a store; write to another folder"):
        ActivationWriter(tmp_path / "b", SPECS, 5, 1, pool)
    assert len(list((tmp_path / "b").iterdir())) == 2


def test_a_folder_that_cannot_be_made_is_a_disk_error(tmp_path, pool):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"cannot make an empty folder: not a directory \('.*file/a'\)"):
        ActivationWriter(tmp_path / "file" / "a", SPECS, 5, 1, pool)


def damage(folder, kind):
    shard, other = folder / "00001.safetensors", folder / "00002.safetensors"
    if kind == "missing":
        shard.unlink()
    elif kind == "truncated":
        os.truncate(shard, shard.stat().st_size - 5)
    elif kind == "longer":
        os.truncate(shard, shard.stat().st_size + 5)
    elif kind == "swapped":
        shard.rename(folder / "x")
        other.rename(shard)
        (folder / "x").rename(other)
    elif kind == "zeroed":
        size = shard.stat().st_size
        os.truncate(shard, size - 40)
        os.truncate(shard, size)
    elif kind == "edited":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    else:
        layout = {"0": (torch.float16, (4, 3)), "1": (torch.bfloat16, (4, 2, 2)), "labels": (torch.int64, (4,))}
        shard.unlink()
        TensorFile.create(shard, layout, {"shard": "1"}).close()


@pytest.mark.parametrize(
    ("kind", "verify", "text"),
    [
        ("missing", False, "is missing"),
        ("truncated", False, r"has \d+ bytes, its header says \d+"),
        ("longer", False, r"has \d+ bytes, its header says \d+"),
        ("swapped", False, "holds shard 2 of a store, in the place of shard 1"),
        ("zeroed", True, "has CRC-32 [0-9a-f]{8}, the index says [0-9a-f]{8}"),
        ("edited", True, "has CRC-32 [0-9a-f]{8}, the index says [0-9a-f]{8}"),
        ("another", False, r"holds float16 \(4, 3\), bfloat16 \(4, 2, 2\), int64 \(4,\), the index says float32 \(4, 3\), "),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path, pool, kind, verify, text):
    write(tmp_path / "a", 20, pool)
    damage(tmp_path / "a", kind)
    with pytest.raises(CheckpointError, match=r"a/00001\.safetensors' " + text) as caught:
        ActivationStore.open(tmp_path / "a", verify=verify)
    assert str(caught.value).endswith("; restore the run's folder from a copy, or start again with --overwrite")


@pytest.mark.parametrize("window_bytes", [0, 8 * SAMPLE_BYTES, PLENTY])
@pytest.mark.parametrize("kind", ["missing", "truncated", "swapped", "another"])
def test_a_shard_damaged_later_is_refused_when_it_is_read(tmp_path, pool, kind, window_bytes):
    write(tmp_path / "a", 20, pool)
    store = ActivationStore.open(tmp_path / "a")
    damage(tmp_path / "a", kind)
    with pytest.raises(CheckpointError, match=r"a/0000[12]\.safetensors'"):
        read(store, 3, pool, shuffle=True, window_bytes=window_bytes)
    assert store.cache is None


def test_shards_of_another_store_are_told_by_their_checksum(tmp_path, pool):
    write(tmp_path / "a", 20, pool)
    tensors, labels = samples(SPECS, 20, seed=1)
    with ActivationWriter(tmp_path / "b", SPECS, 20, 4 * SAMPLE_BYTES, pool) as writer:
        writer.append(tensors, labels)
    shutil.copy(tmp_path / "b" / "00003.safetensors", tmp_path / "a" / "00003.safetensors")
    with pytest.raises(CheckpointError, match=r"a/00003\.safetensors' has CRC-32"):
        ActivationStore.open(tmp_path / "a", verify=True)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda index: "{", "is no JSON"),
        (lambda index: [], "has format None, this version reads 2"),
        (lambda index: {**index, "format": 3}, "has format 3, this version reads 2"),
        (lambda index: {**index, "num_samples": 21}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "num_samples": "20"}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "shard_samples": 0}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "shard_samples": 5}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "shards": index["shards"][:-1]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "shards": index["shards"][::-1]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "shards": [{**shard, "crc32": None} for shard in index["shards"]]}, "contradicts itself"),
        (lambda index: {**index, "shards": [{**shard, "bytes": -1} for shard in index["shards"]]}, "contradicts itself"),
        (
            lambda index: {**index, "shards": [{**shard, "file": "/etc/passwd"} for shard in index["shards"]]},
            "contradicts itself",
        ),
        (lambda index: {**index, "shards": 3}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "tensors": [{"dtype": "F33", "shape": [3]}]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "tensors": [{"dtype": ["F32"], "shape": [3]}]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "tensors": [{"dtype": "F32", "shape": [-3]}]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "tensors": [{"dtype": "F32"}]}, "contradicts itself or lacks a part"),
        (lambda index: {key: index[key] for key in index if key != "num_samples"}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "label_shape": [-1]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "label_shape": ["3"]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "label_shape": 3}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "kept_as": "int4"}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "kept_as": ["int8"]}, "contradicts itself or lacks a part"),
    ],
)
def test_a_damaged_index_is_refused_by_name(tmp_path, pool, edit, text):
    write(tmp_path / "a", 20, pool)
    path = tmp_path / "a" / "index.json"
    content = edit(json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=r"a/index\.json' " + text) as caught:
        ActivationStore.open(tmp_path / "a")
    assert str(caught.value).endswith("; restore the run's folder from a copy, or start again with --overwrite")


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda index: {**index, "label_shape": [2]}, r"00000.safetensors' holds .*, int64 \(4,\), the index .* int64 \(4, 2\);"),
        (lambda index: {**index, "tensors": index["tensors"][:1]}, r"00000.safetensors' holds float32 \(4, 3\), bfloat16"),
        (
            lambda index: {**index, "shards": [{**shard, "bytes": 5} for shard in index["shards"]]},
            r"00000.safetensors' has \d+ bytes, the index says 5;",
        ),
    ],
)
def test_an_index_that_contradicts_the_shards_is_refused(tmp_path, pool, edit, text):
    write(tmp_path / "a", 20, pool)
    path = tmp_path / "a" / "index.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=text):
        ActivationStore.open(tmp_path / "a")


def test_the_index_names_the_checksum_of_every_shard(tmp_path, pool):
    write(tmp_path / "a", 10, pool)
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [4, 4, 2]
    for shard in index["shards"]:
        assert int(shard["crc32"], 16) == zlib.crc32((tmp_path / "a" / shard["file"]).read_bytes())
        assert "sha256" not in shard

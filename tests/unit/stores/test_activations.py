"""Tests of the store of boundary activations: what was appended comes back; order; damage; memory."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.activation_stores import PLENTY, SAMPLE_BYTES, label_lists, read, through, write, write_kept, write_labelled
from helpers.tensors import bits
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores import shard_prefetch
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.encoding import ENCODINGS, encoded_bytes
from lowmem_pnn.stores.header import NAME_BY_DTYPE
from lowmem_pnn.stores.shard_layout import resident_bytes

GOLDEN_WHOLE = [[9, 8, 2, 1, 11, 3, 4, 7, 5, 6, 0, 10]]
GOLDEN_WINDOWS = [[9, 4, 8, 5, 11, 1, 0, 10, 6, 7, 3, 2]]


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
        assert store.labels.shape == label_shape
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
    assert resident_bytes(specs, 10, TensorSpec((16,), torch.int64)) - resident_bytes(specs, 10) == 10 * 15 * 8
    # As the specs alone would have it, ten samples would go into a shard and into a window.
    with ActivationWriter(
        tmp_path / "a", specs, 20, resident_bytes(specs, 10), pool, labels=TensorSpec((1000,), torch.int64)
    ) as writer:
        writer.append((torch.zeros(20, 3),), torch.zeros(20, 1000, dtype=torch.int64))
    assert writer.shard_samples == 1
    store = ActivationStore.open(tmp_path / "a")
    read(store, 5, pool, window_bytes=resident_bytes(specs, 20, TensorSpec((1000,), torch.int64)) - 1)
    assert store.cache is None
    read(store, 5, pool, window_bytes=resident_bytes(specs, 20, TensorSpec((1000,), torch.int64)))
    assert store.cache is not None


@given(
    count=st.integers(1, 40),
    shard_samples=st.integers(1, 9),
    batch_size=st.integers(1, 11),
    window_samples=st.integers(0, 50),
    start=st.integers(0, 45),
    shuffle=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_start_gives_the_same_tail(pool, count, shard_samples, batch_size, window_samples, start, shuffle):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "a", count, pool, shard_samples=shard_samples)
        store = ActivationStore.open(Path(folder) / "a")
        options = {"shuffle": shuffle, "epoch": 3, "window_bytes": window_samples * SAMPLE_BYTES}
        whole = read(store, batch_size, pool, **options)
        tail = read(store, batch_size, pool, start=start, **options)
    assert len(whole) == -(-count // batch_size)
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

"""The writer of activations: what it holds, counts, syncs and refuses; a store that was not completed has no index."""

import errno
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from helpers.activation_stores import SAMPLE_BYTES, SPECS, label_lists, read, samples, write, write_kept
from lowmem_pnn.errors import CheckpointError, DiskError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores import activation_writer
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.encoding import OverflowFault
from lowmem_pnn.stores.tensor_file import IoCounter


def test_the_writer_holds_the_small_form_of_what_waits(tmp_path, monkeypatch):
    made, allocate = [], activation_writer.allocate_as_in_file
    monkeypatch.setattr(activation_writer, "allocate_as_in_file", lambda *args: made.append(allocate(*args)) or made[-1])
    specs = (TensorSpec((64,), torch.float32),)
    with ThreadPoolExecutor(1) as pool:
        write_kept(tmp_path / "a", specs, 12, "int8", pool)
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in made[0]] == [
        (torch.int8, (4, 64)), (torch.float32, (4, 1)), (torch.int64, (4,)),
    ]  # fmt: skip


def test_a_value_that_cannot_be_kept_leaves_no_index(tmp_path, pool):
    specs = (TensorSpec((2,), torch.float32),)
    with (
        pytest.raises(OverflowFault, match=r"1e\+06 is beyond 65504"),
        ActivationWriter(tmp_path / "a", specs, 2, 1000, pool, encoding="float16") as writer,
    ):
        writer.append((torch.tensor([[1.0, 2.0], [3.0, 1e6]]),), torch.zeros(2, dtype=torch.int64))
    assert not (tmp_path / "a" / "index.json").exists()


def test_labels_of_another_shape_are_refused(tmp_path, pool):
    writer = ActivationWriter(tmp_path / "a", (TensorSpec((), torch.float32),), 8, 1, pool, labels=TensorSpec((3,), torch.int64))
    for labels in (torch.zeros(4).long(), torch.zeros(4, 2).long(), torch.zeros(4, 3)):
        with pytest.raises(CheckpointError, match=r"takes float32 \(4,\), int64 \(4, 3\), got float32 \(4,\), "):
            writer.append((torch.zeros(4),), labels)
    writer.abort()


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


def test_a_narrower_type_is_widened_and_a_wider_one_refused(tmp_path, pool):
    values = torch.tensor([[1.5], [-2.25]])
    labels = torch.zeros(2, dtype=torch.int64)
    with ActivationWriter(tmp_path / "a", (TensorSpec((1,), torch.float32),), 2, 1000, pool) as writer:
        writer.append((values.bfloat16(),), labels)
    [((stored,), _)] = read(ActivationStore.open(tmp_path / "a"), 2, pool)
    assert stored.dtype == torch.float32
    assert torch.equal(stored, values)
    writer = ActivationWriter(tmp_path / "b", (TensorSpec((1,), torch.bfloat16),), 2, 1000, pool)
    with pytest.raises(CheckpointError, match=r"takes bfloat16 .* got float32"):
        writer.append((values,), labels)
    writer.abort()

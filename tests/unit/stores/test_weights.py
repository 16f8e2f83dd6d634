"""Tests of the weight store: generations, commits, damage, export."""

import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import safetensors.torch
import torch

from helpers.pagecache import watch_calls
from lowmem_pnn.errors import CheckpointError, DiskError
from lowmem_pnn.memory.pool import MemoryPool
from lowmem_pnn.memory.process_meter import private_bytes
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.keys import state_key, weight_key
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.stores.weights import WeightStore

LAYOUTS = [
    {
        weight_key("0.weight"): (torch.float32, (4, 3)),
        weight_key("0.bias"): (torch.bfloat16, (4,)),
        state_key("0.weight", "exp_avg"): (torch.float32, (4, 3)),
        state_key("0.weight", "step"): (torch.float32, ()),
    },
    {
        weight_key("1.running_mean"): (torch.float32, (7,)),
        weight_key("1.num_batches_tracked"): (torch.int64, ()),
    },
    {weight_key("2.weight"): (torch.float32, (4, 3))},
]
REST = {weight_key("unused.table"): (torch.float16, (5,))}


def fill(store, partition, value):
    with store.writer(partition) as file:
        for name, entry in file.entries.items():
            file.write_from(name, torch.full(entry.shape, value).to(entry.dtype))


def values(store, partition):
    with store.reader(partition) as file:
        return {name: file.read(name).reshape(-1)[0].item() for name in file.entries}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path):
    """Three partitions and the rest, committed, filled with 0, 1, 2 and 9."""
    store = WeightStore.create(tmp_path / "weights", LAYOUTS, rest=REST)
    for partition, value in [(0, 0), (1, 1), (2, 2), ("rest", 9)]:
        fill(store, partition, value)
    store.seal([0, 1, 2, "rest"])
    return store


def test_a_commit_is_come_back_to(store):
    folder, state = store.folder, json.loads(json.dumps(store.state()))
    assert names(folder) == [*(f"p00{number}.g000000.safetensors" for number in range(3)), "rest.g0.safetensors"]
    for entry in [*state["partitions"], state["rest"]]:
        content = (folder / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    again = WeightStore.open(folder, state)
    assert again.state() == state
    assert again.num_partitions == 3
    assert [again.layout(number) for number in range(3)] == LAYOUTS
    assert again.layout("rest") == REST
    assert [set(values(again, partition).values()) for partition in (0, 1, 2, "rest")] == [{0}, {1}, {2}, {9}]
    assert again.partition_of(weight_key("1.running_mean")) == 1
    assert again.partition_of(weight_key("unused.table")) == "rest"


def test_a_store_without_a_rest_has_none(tmp_path):
    store = WeightStore.create(tmp_path / "weights", LAYOUTS[:1])
    assert store.state() == {"format": 1, "partitions": [None], "rest": None}
    fill(store, 0, 5)
    state = store.seal([0])
    assert state["rest"] is None
    assert WeightStore.open(tmp_path / "weights", state).num_partitions == 1


def test_committed_bytes_are_never_written_to(store):
    before = {path: path.read_bytes() for path in store.folder.iterdir()}
    fill(store, 0, 5)
    assert store.committed_file(0).name == "p000.g000000.safetensors"
    assert set(values(store, 0).values()) == {5}, "the newest bytes are read"
    state = store.seal([0])
    assert {path: path.read_bytes() for path in before} == before
    assert store.committed_file(0).name == state["partitions"][0]["file"] == "p000.g000001.safetensors"
    assert set(values(store, 0).values()) == {5}


def test_a_working_file_is_changed_until_it_is_sealed(store):
    fill(store, 0, 5)
    fill(store, 0, 6)
    assert len(names(store.folder)) == 5
    store.seal([0])
    fill(store, 0, 7)
    assert set(values(store, 0).values()) == {7}
    assert store.state()["partitions"][0]["file"] == "p000.g000001.safetensors"
    store.rollback()
    assert set(values(store, 0).values()) == {6}


def test_sealing_leaves_other_partitions_as_they_are(store):
    fill(store, 0, 5)
    fill(store, 1, 6)
    before = store.state()
    after = store.seal([1, 2])
    assert [old == new for old, new in zip(before["partitions"], after["partitions"], strict=True)] == [True, False, True]
    store.rollback()
    assert [set(values(store, number).values()) for number in range(3)] == [{0}, {6}, {2}]


def test_a_working_file_begins_as_zeros_and_is_then_the_same_for_all(store):
    fill(store, 2, 5)
    store.seal([2])
    assert not store.has_working_file(2)
    with store.writer(2) as file, store.writer(2) as same:
        assert file.read(weight_key("2.weight")).count_nonzero() == 0
        file.write_from(weight_key("2.weight"), torch.full((4, 3), 8.0))
        assert same.read(weight_key("2.weight")).unique().tolist() == [8]
    assert store.has_working_file(2)


def test_a_frozen_file_is_read_and_sealed_while_the_next_is_written(store):
    fill(store, 1, 5)
    store.freeze([0, 1])
    assert not store.has_working_file(1)
    assert set(values(store, 1).values()) == {5}
    fill(store, 1, 6)
    state = store.seal([0, 1])
    assert state["partitions"][1]["file"] == "p001.g000001.safetensors"
    assert set(values(store, 1).values()) == {6}
    # What was written since the freeze is not part of the commit.
    store.rollback()
    assert set(values(store, 1).values()) == {5}
    assert state["partitions"][0]["file"] == "p000.g000000.safetensors"


def test_a_frozen_file_is_not_obsolete(store):
    fill(store, 1, 5)
    store.freeze([1])
    store.discard_obsolete([])
    assert set(values(store, 1).values()) == {5}
    store.seal([1])


def test_tensors_are_read_from_their_homes(store):
    with store.tensor_reader() as tensors:
        assert tensors.read(weight_key("2.weight")).unique().tolist() == [2]
        assert tensors.read(weight_key("1.running_mean")).unique().tolist() == [1]
        with pytest.raises(CheckpointError, match=r"holds no tensor 'weight/3\.weight'"):
            tensors.read(weight_key("3.weight"))
    assert store.tensor_layout(weight_key("2.weight")) == (torch.float32, (4, 3))


def test_what_is_not_in_the_state_did_not_happen(store):
    first = store.state()
    fill(store, 0, 5)
    second = store.seal([0])
    fill(store, 1, 6)
    (store.folder / "notes.txt").touch()
    again = WeightStore.open(store.folder, first, keep=[second])
    assert names(store.folder) == [
        "notes.txt", "p000.g000000.safetensors", "p000.g000001.safetensors", "p001.g000000.safetensors",
        "p002.g000000.safetensors", "rest.g0.safetensors",
    ]  # fmt: skip
    assert set(values(again, 0).values()) == {0}
    # A new generation never takes the name of a file that is kept.
    fill(again, 0, 7)
    assert again.seal([0])["partitions"][0]["file"] == "p000.g000002.safetensors"
    WeightStore.open(store.folder, first)
    assert names(store.folder) == [
        "notes.txt",
        *(f"p00{number}.g000000.safetensors" for number in range(3)),
        "rest.g0.safetensors",
    ]


def test_obsolete_files_go_and_kept_ones_stay(store):
    states = [store.state()]
    for value in (5, 6, 7):
        fill(store, 0, value)
        states.append(store.seal([0]))
    fill(store, 1, 8)
    store.discard_obsolete(states[1:3])
    generations = [f"p000.g00000{number}.safetensors" for number in (1, 2, 3)]
    rest = ["p001.g000000.safetensors", "p001.g000001.safetensors", "p002.g000000.safetensors", "rest.g0.safetensors"]
    assert names(store.folder) == [*generations, *rest], "the committed and the working files stay in any case"
    older = WeightStore.open(store.folder, states[2])
    assert set(values(older, 0).values()) == {6}


def test_states_of_an_unfinished_store_can_be_kept(tmp_path):
    store = WeightStore.create(tmp_path / "weights", LAYOUTS)
    fill(store, 0, 0)
    store.discard_obsolete([store.state()])
    assert names(tmp_path / "weights") == ["p000.g000000.safetensors"]
    with pytest.raises(CheckpointError, match=r"partition 1 in '.*weights' was never committed; start again with --overwrite"):
        WeightStore.open(tmp_path / "weights", store.seal([0]))


def test_create_begins_anew(store):
    (store.folder / "notes.txt").touch()
    again = WeightStore.create(store.folder, LAYOUTS)
    assert names(store.folder) == ["notes.txt"]
    fill(again, 0, 1)
    assert names(store.folder) == ["notes.txt", "p000.g000000.safetensors"]


def damage(store, kind):
    path, other = store.committed_file(0), store.committed_file(2)
    if kind == "missing":
        path.unlink()
    elif kind == "short":
        os.truncate(path, path.stat().st_size - 1)
    elif kind == "edited":
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(content)
    elif kind == "swapped":
        path.write_bytes(other.read_bytes())
    else:
        path.unlink()
        TensorFile.create(path, {**LAYOUTS[0], "more": (torch.float32, (9,))}, {"file": path.name}).close()


@pytest.mark.parametrize(
    ("kind", "verify", "text"),
    [
        ("missing", False, "is missing"),
        ("short", False, r"has \d+ bytes, its header says \d+"),
        ("another", False, r"has \d+ bytes, the journal says \d+"),
        ("edited", True, "has sha256 [0-9a-f]{64}, the journal says [0-9a-f]{64}"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_nothing_deleted(store, kind, verify, text):
    first = store.state()
    fill(store, 1, 5)
    store.seal([1])
    damage(store, kind)
    before = names(store.folder)
    with pytest.raises(CheckpointError, match=r"weights/p000\.g000000\.safetensors' " + text) as caught:
        WeightStore.open(store.folder, first, verify=verify)
    assert str(caught.value).endswith("; restore the run's folder from a copy, or start again with --overwrite")
    assert names(store.folder) == before


def test_swapped_files_are_told_even_without_hashes(tmp_path):
    store = WeightStore.create(tmp_path / "weights", [{"weight/a": (torch.float32, (3,))}, {"weight/b": (torch.float32, (3,))}])
    fill(store, 0, 0)
    fill(store, 1, 1)
    state = store.seal([0, 1])
    store.committed_file(0).write_bytes(store.committed_file(1).read_bytes())
    with pytest.raises(CheckpointError, match=r"p000\.g000000\.safetensors' holds what was written as 'p001\.g000000"):
        WeightStore.open(tmp_path / "weights", state, verify=False)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda state: {**state, "format": 2}, "have format 2, this version reads 1; resume with the version that wrote them"),
        (lambda state: {**state, "partitions": state["partitions"][::-1]}, "names 'p002.g000000.safetensors' for partition 0"),
        (lambda state: {**state, "rest": {**state["rest"], "file": "../x"}}, "names '../x' for partition rest"),
        (lambda state: {**state, "rest": state["partitions"][0]}, "names 'p000.g000000.safetensors' for partition rest"),
    ],
)
def test_a_state_that_cannot_be_is_refused(store, edit, text):
    with pytest.raises(CheckpointError, match="the journal.*" + re.escape(text)):
        WeightStore.open(store.folder, edit(store.state()))


def test_sealed_files_are_synced_before_their_folder(store, monkeypatch):
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    fill(store, 0, 5)
    fill(store, 2, 5)
    monkeypatch.setattr(os, "fsync", note)
    store.seal([0, 1, 2])
    assert synced == ["p000.g000001.safetensors", "p002.g000001.safetensors", "weights"]


def test_a_failed_sync_is_never_tried_again(store, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = store.state()
    fill(store, 0, 5)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match=r"cannot sync it: input/output error \('.*p000\.g000001\.safetensors'\)"):
        store.seal([0])
    monkeypatch.undo()
    assert store.seal([0]) == before, "there is nothing left to seal"
    assert set(values(store, 0).values()) == {0}
    assert names(store.folder) == [*(f"p00{number}.g000000.safetensors" for number in range(3)), "rest.g0.safetensors"]


def test_bytes_are_counted(tmp_path):
    counter = IoCounter()
    store = WeightStore.create(tmp_path / "weights", LAYOUTS[:1], counter)
    fill(store, 0, 3)
    assert counter.bytes_written == store.seal([0])["partitions"][0]["bytes"]
    before = counter.bytes_read
    values(store, 0)
    assert counter.bytes_read - before == store.committed_file(0).stat().st_size


def test_an_export_holds_the_models_own_names(store, tmp_path):
    order = ["2.weight", "0.weight", "tied.weight", "0.bias", "1.running_mean", "1.num_batches_tracked", "unused.table"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"an older one")
    fill(store, 2, 55)  # not committed
    before = os.umask(0o022)
    try:
        store.export(path, order, {"tied.weight": "0.weight"})
    finally:
        os.umask(before)
    loaded = safetensors.torch.load_file(path)
    assert {name: tensor.reshape(-1)[0].item() for name, tensor in loaded.items()} == {
        "2.weight": 2, "0.weight": 0, "tied.weight": 0, "0.bias": 0, "1.running_mean": 1, "1.num_batches_tracked": 1,
        "unused.table": 9,
    }  # fmt: skip
    assert loaded["0.bias"].dtype == torch.bfloat16
    assert loaded["tied.weight"].shape == (4, 3)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with TensorFile.open(path) as file:
        assert list(file.entries) == order
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert names(tmp_path) == ["model.safetensors", "weights"]


def test_the_bytes_of_an_export_are_in_the_models_order(store, tmp_path):
    order = ["2.weight", "0.bias", "0.weight"]
    store.export(tmp_path / "model.safetensors", order)
    with TensorFile.open(tmp_path / "model.safetensors") as file:
        assert sorted(order, key=lambda name: file.entries[name].offset) == order


def test_an_export_that_fails_leaves_the_old_one(store, tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.safetensors"
    path.write_bytes(b"an older one")
    with pytest.raises(CheckpointError, match=r"weights' holds no tensor 'weight/fc\.bias'; restore"):
        store.export(path, ["0.weight", "fc.bias"])
    with pytest.raises(DiskError, match=r"cannot create a file of .*: no such file or directory \('.*nowhere/m\.new'\)"):
        store.export(tmp_path / "nowhere" / "m", ["0.weight"])
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(DiskError, match="no space left on device"):
        store.export(path, ["0.weight"])
    assert path.read_bytes() == b"an older one"
    assert names(tmp_path) == ["model.safetensors", "weights"]


def test_an_export_takes_little_memory(tmp_path):
    layout = {weight_key(f"{number}.weight"): (torch.float32, (1 << 22,)) for number in range(6)}
    store = WeightStore.create(tmp_path / "weights", [layout])
    with store.writer(0):
        pass
    store.seal([0])
    peak, before, copy = 0, private_bytes(), TensorFile._write_bytes

    def measure(self, source, offset):
        nonlocal peak
        peak = max(peak, private_bytes() - before)
        copy(self, source, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorFile, "_write_bytes", measure)
        store.export(tmp_path / "model.safetensors", [f"{number}.weight" for number in range(6)])
    assert (tmp_path / "model.safetensors").stat().st_size > 96 << 20
    assert peak < 8 << 20


@pytest.mark.parametrize("available", [1 << 40, 1 << 10])
def test_only_weights_that_outgrow_memory_move_past_the_page_cache(tmp_path, monkeypatch, available):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    moved = watch_calls(monkeypatch)
    layout = {"weight/a": (torch.float32, (300, 1024)), "weight/b": (torch.float32, (70_001,)), "weight/c": (torch.float32, (3,))}
    blocks = MemoryPool(1 << 22)
    tensors = {}
    store = WeightStore.create(tmp_path / "weights", [layout])
    for step in range(2):  # a new file, then in place of what is there
        with store.writer(0) as file:
            for name, (dtype, shape) in layout.items():
                tensors[name] = blocks.empty(shape, dtype).normal_().add_(step)
                file.write_from(name, tensors[name])
        with store.tensor_reader(blocks.empty) as reader:
            for name, tensor in tensors.items():
                assert torch.equal(reader.read(name), tensor)
    again = WeightStore.open(tmp_path / "weights", store.seal([0]))
    with again.tensor_reader() as reader:
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name), tensor)
    if available == 1 << 40:
        assert not moved
    else:
        assert set(moved) in ({300 * 4096}, set()), "set() where the file system has no direct transfers"

"""Tests of tensor files: the format, both ways with the safetensors library; damage; full disks."""

import errno
import hashlib
import json
import os
import re
import resource
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pagecache import cached_bytes, watch_calls
from helpers.tensors import LAYOUTS, NAMES, bits, random_tensor
from lowmem_pnn.errors import CheckpointError, DiskError
from lowmem_pnn.memory.aligned import aligned_empty
from lowmem_pnn.stores import tensor_file
from lowmem_pnn.stores.disk import IoCounter, sha256
from lowmem_pnn.stores.header import DTYPE_BY_NAME, MAX_HEADER_BYTES, NAME_BY_DTYPE
from lowmem_pnn.stores.tensor_file import TensorFile

REMEDY = "; restore it from a copy, or delete it and run again"


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


@contextmanager
def file_size_limit(nbytes: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@given(layout=LAYOUTS, metadata=st.dictionaries(NAMES, NAMES, max_size=2), keep_order=st.booleans())
@settings(deadline=None, max_examples=80)
def test_what_is_written_comes_back_bit_for_bit(layout, metadata, keep_order):
    tensors = {name: random_tensor(*kind, seed) for seed, (name, kind) in enumerate(layout.items())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        with TensorFile.create(path, layout, metadata, keep_order=keep_order) as file:
            for name, tensor in tensors.items():
                file.write_from(name, tensor)
        with TensorFile.open(path) as file:
            assert list(file.entries) == list(layout)
            assert file.metadata == metadata
            assert file.size == path.stat().st_size
            for name, tensor in tensors.items():
                back = file.read(name)
                assert bits(back) == bits(tensor)
                assert back.data_ptr() % 64 == 0
        # The library reads the same.
        loaded = safetensors.torch.load_file(path)
        assert {name: bits(tensor) for name, tensor in loaded.items()} == {name: bits(t) for name, t in tensors.items()}


@given(layout=LAYOUTS)
@settings(deadline=None, max_examples=50)
def test_files_of_the_library_are_read(layout):
    tensors = {name: random_tensor(*kind, seed) for seed, (name, kind) in enumerate(layout.items())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
        with TensorFile.open(path) as file:
            assert file.metadata == {"format": "pt"}
            assert {name: bits(file.read(name)) for name in file.entries} == {name: bits(t) for name, t in tensors.items()}


@given(layout=LAYOUTS)
@settings(deadline=None, max_examples=80)
def test_tensors_are_aligned_where_the_format_allows(layout):
    with tempfile.TemporaryDirectory() as folder, TensorFile.create(Path(folder) / "x", layout) as file:
        for entry in file.entries.values():
            assert entry.offset % entry.dtype.itemsize == 0
            for alignment in (64, 4096):
                if entry.nbytes % alignment == 0:
                    assert entry.offset % alignment == 0


def test_keep_order_keeps_the_order_of_bytes(tmp_path):
    layout = {"weight": (torch.float32, (3, 3)), "bias": (torch.float32, (3,)), "big": (torch.float32, (4, 4))}
    with TensorFile.create(tmp_path / "kept", layout, keep_order=True) as file:
        assert sorted(file.entries, key=lambda name: file.entries[name].offset) == list(layout)
    with TensorFile.create(tmp_path / "aligned", layout) as file:
        assert sorted(file.entries, key=lambda name: file.entries[name].offset) == ["big", "weight", "bias"]


def test_keep_order_gives_way_to_the_alignment_of_elements(tmp_path):
    layout = {"flag": (torch.bool, (3,)), "weight": (torch.float32, (2,))}
    with TensorFile.create(tmp_path / "x", layout, keep_order=True) as file:
        assert file.entries["weight"].offset % 4 == 0


def test_every_element_type_has_one_code():
    assert len(NAME_BY_DTYPE) == len(DTYPE_BY_NAME) >= 16


@given(rows=st.integers(1, 9), start=st.integers(0, 8), count=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_rows_are_read_and_written_in_place(rows, start, count):
    start = min(start, rows)
    count = min(count, rows - start)
    part = random_tensor(torch.bfloat16, (count, 3))
    expected = torch.zeros(rows, 3, dtype=torch.bfloat16)
    expected[start : start + count] = part
    layout = {"a": (torch.int32, (7,)), "x": (torch.bfloat16, (rows, 3))}
    with tempfile.TemporaryDirectory() as folder, TensorFile.create(Path(folder) / "x", layout) as file:
        file.write_from("x", part, start)
        assert bits(file.read("x")) == bits(expected)
        assert file.read("a").tolist() == [0] * 7
        back = aligned_empty((count, 3), torch.bfloat16)
        file.read_into("x", back, start)
        assert bits(back) == bits(part)


def test_a_parameter_that_requires_grad_is_written_and_read(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(4.0))
    with TensorFile.create(tmp_path / "x", {"x": (torch.float32, (4,))}) as file:
        file.write_from("x", parameter)
        with torch.no_grad():
            parameter.zero_()
        file.read_into("x", parameter)
    assert parameter.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_interrupted_transfers_go_on(tmp_path, monkeypatch):
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, [buffers[0][:5]], offset))
    counter = IoCounter()
    tensor = random_tensor(torch.float64, (10,))
    with TensorFile.create(tmp_path / "x", {"x": (torch.float64, (10,))}, counter=counter) as file:
        file.write_from("x", tensor)
        assert bits(file.read("x")) == bits(tensor)
    assert (counter.bytes_written, counter.bytes_read) == (file.entries["x"].offset + 80, 80)


def test_threads_may_share_a_file_and_a_counter(tmp_path):
    counter = IoCounter()
    layout = {str(k): (torch.int64, (1000,)) for k in range(8)}
    with TensorFile.create(tmp_path / "x", layout, counter=counter) as file, ThreadPoolExecutor(4) as pool:
        header = counter.bytes_written
        tensors = [torch.full((1000,), k) for k in range(8)]
        list(pool.map(lambda k: file.write_from(str(k), tensors[k]), range(8)))
        back = list(pool.map(lambda k: file.read(str(k % 8)), range(64)))
    assert all(torch.equal(tensor, tensors[k % 8]) for k, tensor in enumerate(back))
    assert (counter.bytes_written - header, counter.bytes_read) == (8 * 8000, 64 * 8000)


def test_copy_from_moves_more_than_one_buffer(tmp_path):
    tensor = random_tensor(torch.uint8, (9 << 20,))
    with TensorFile.create(tmp_path / "a", {"x": (torch.uint8, tuple(tensor.shape))}) as source:
        source.write_from("x", tensor)
        with TensorFile.create(tmp_path / "b", {"y": (torch.uint8, tuple(tensor.shape)), "z": (torch.int8, (2,))}) as target:
            target.copy_from("y", source, "x")
            assert torch.equal(target.read("y"), tensor)
            with pytest.raises(CheckpointError, match=r"a' holds 'x' as uint8 \(9437184,\), '.*b' has room for int8 \(2,\)"):
                target.copy_from("z", source, "x")


def test_access_rights_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        TensorFile.create(tmp_path / "x", {}).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_create_never_overwrites(tmp_path):
    (tmp_path / "x").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=r"cannot create '.*/x': it exists already; delete it, or use another folder"):
        TensorFile.create(tmp_path / "x", {})
    assert (tmp_path / "x").read_bytes() == b"precious"


def test_a_header_above_the_limit_is_not_written(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"x' would need a header of \d+ bytes, above the limit of 16777216; use fewer tensors"
    ):
        TensorFile.create(tmp_path / "x", {"n" * MAX_HEADER_BYTES: (torch.bool, ())})
    assert not (tmp_path / "x").exists()


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FAULTS = {
    "empty file": (b"", None, r"has 0 bytes, no room for the header's length"),
    "huge header": ({}, 1 << 40, r"has a header of 1099511627776 bytes, above the limit of 16777216"),
    "header cut off": ({}, 100, r"has 10 bytes, its header alone should end at byte 108"),
    "not JSON": (b"{nothing}", None, r"has a header that cannot be read \(Expecting property name"),
    "not UTF-8": (b'{"\xff": 1}', None, r"has a header that cannot be read \('utf-8' codec"),
    "nested": (b"[" * 100_000, None, r"has a header that cannot be read \("),
    "a list": ([], None, r"has a header that is no JSON object"),
    "twice": (b'{"a": 1, "a": 2}', None, r"has a header that cannot be read \('a' is there twice\)"),
    "metadata": ({"__metadata__": {"a": 1}}, None, r"has '__metadata__' that does not map texts to texts"),
    "no entry": ({"a": 3}, None, r"describes tensor 'a' by something else than dtype, shape and data_offsets"),
    "a part missing": ({"a": {"dtype": "F32", "shape": [2]}}, None, r"describes tensor 'a' by something else"),
    "element type": ({"a": {**ONE, "dtype": "F33"}}, None, r"has tensor 'a' of element type 'F33', known are BOOL, U8"),
    "element type list": ({"a": {**ONE, "dtype": ["F32"]}}, None, r"has tensor 'a' of element type \['F32'\]"),
    "negative": ({"a": {**ONE, "shape": [-2]}}, None, r"has tensor 'a' of shape \[-2\] at offsets \[0, 8\]"),
    "a bool": ({"a": {**ONE, "shape": [True, 2]}}, None, r"has tensor 'a' of shape \[True, 2\]"),
    "a fraction": ({"a": {**ONE, "shape": [2.0]}}, None, r"has tensor 'a' of shape \[2.0\]"),
    "above int64": ({"a": {**ONE, "shape": [0, 2**63], "data_offsets": [0, 0]}}, None, r"has tensor 'a' of shape \[0, 9"),
    "three offsets": ({"a": {**ONE, "data_offsets": [0, 8, 9]}}, None, r"has tensor 'a' of shape \[2\] at offsets \[0, 8, 9\]"),
    "size": ({"a": {**ONE, "shape": [3]}}, None, r"has tensor 'a' of 12 bytes at offsets \[0, 8\]"),
    "gap": ({"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}}, None, r"has tensor 'b' at byte \d+, which leaves a gap after"),
    "gap at start": ({"a": {**ONE, "data_offsets": [4, 12]}}, None, r"has tensor 'a' at byte \d+, which leaves a gap after"),
    "overlap": ({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, None, r"has tensor 'b' at byte \d+, which overlaps the"),
    "data cut off": ({"a": ONE}, None, r"has 69 bytes, its header says 77"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_header_is_refused_by_name(tmp_path, fault):
    header, length, text = FAULTS[fault]
    path = tmp_path / "damaged.safetensors"
    if fault == "empty file":
        path.write_bytes(b"")
    else:
        write_raw(path, header, length=length)
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + "' " + text) as caught:
        TensorFile.open(path)
    assert str(caught.value).endswith(REMEDY)
    assert "\n" not in str(caught.value)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_file_of_another_length_is_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        with TensorFile.create(path, {"x": (torch.float32, (5,)), "y": (torch.int8, ())}) as file:
            size = file.size
        os.truncate(path, data.draw(st.integers(0, 2 * size).filter(lambda length: length != size)))
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            TensorFile.open(path)


def test_a_file_that_shrinks_while_open_is_refused(tmp_path):
    with TensorFile.create(tmp_path / "x", {"x": (torch.float32, (5,))}) as file:
        os.truncate(tmp_path / "x", file.size - 3)
        end = file.size
        with pytest.raises(CheckpointError, match=rf"x' ends at byte {end}, inside 'x', which goes to {end + 3}; restore it"):
            file.read("x")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone' is missing; do this"):
        TensorFile.open(tmp_path / "gone", remedy="do this")
    with pytest.raises(CheckpointError, match=r"is a folder, not a safetensors file"):
        TensorFile.open(tmp_path)


def test_what_the_file_does_not_hold_is_refused(tmp_path):
    with TensorFile.create(tmp_path / "x", {"x": (torch.float32, (5, 2)), "s": (torch.int64, ())}) as file:
        with pytest.raises(CheckpointError, match=r"x' holds no tensor 'y'; restore it"):
            file.read("y")
        for tensor, start in [
            (torch.zeros(5, 2, dtype=torch.float16), 0),
            (torch.zeros(6, 2), 0),
            (torch.zeros(2, 2), 4),
            (torch.zeros(2, 2), -1),
            (torch.zeros(5, 3), 0),
            (torch.zeros(10), 0),
            (torch.tensor(0.0), 0),
        ]:
            asked = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} from row {start}"
            with pytest.raises(CheckpointError, match=re.escape(f"holds 'x' as float32 (5, 2), asked for {asked}")):
                file.read_into("x", tensor, start)
            with pytest.raises(CheckpointError, match=re.escape(asked)):
                file.write_from("x", tensor, start)
        with pytest.raises(CheckpointError, match=re.escape("holds 's' as int64 (), asked for int64 () from row 1")):
            file.read_into("s", torch.tensor(0), 1)
        assert file.read("x").count_nonzero() == 0


def test_a_full_disk_says_what_is_left(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with TensorFile.create(tmp_path / "x", {"x": (torch.float32, (1000,))}) as file:
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(
            DiskError, match=r"cannot write 4\.0 kB: no space left on device, [\d.]+ [kMGT]?B are left \('.*x'\); make"
        ):
            file.write_from("x", torch.zeros(1000))
        with pytest.raises(DiskError, match=r"no space left on device"):
            TensorFile.create(tmp_path / "y", {"x": (torch.float32, (1000,))})
    assert not (tmp_path / "y").exists()


def test_a_file_above_the_systems_limit_is_not_left_behind(tmp_path):
    with file_size_limit(1 << 16), pytest.raises(DiskError, match=r"cannot create a file of 1\.0 MB: file too large \('.*x'\)"):
        TensorFile.create(tmp_path / "x", {"x": (torch.uint8, (1_000_000,))})
    assert not (tmp_path / "x").exists()


def test_a_failed_sync_is_a_disk_error(tmp_path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with TensorFile.create(tmp_path / "x", {}) as file:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(DiskError, match=r"cannot sync it: input/output error \('.*x'\); check the disk"):
            file.sync()


def test_a_file_opened_to_be_read_cannot_be_written(tmp_path):
    TensorFile.create(tmp_path / "x", {"x": (torch.float32, (5,))}).close()
    with TensorFile.open(tmp_path / "x") as file, pytest.raises(DiskError, match="cannot write"):
        file.write_from("x", torch.ones(5))
    with TensorFile.open(tmp_path / "x", writable=True) as file:
        file.write_from("x", torch.ones(5))
    with TensorFile.open(tmp_path / "x") as file:
        file.drop_cache()
        assert file.read("x").tolist() == [1.0] * 5


def test_sha256_is_that_of_the_bytes(tmp_path):
    content = os.urandom((4 << 20) + 17)
    (tmp_path / "x").write_bytes(content)
    counter = IoCounter()
    assert sha256(tmp_path / "x", counter) == hashlib.sha256(content).hexdigest()
    assert counter.bytes_read == len(content)
    with pytest.raises(CheckpointError, match="gone' is missing"):
        sha256(tmp_path / "gone")


@pytest.mark.parametrize("refused", ["not", "when opened", "when used"])
def test_a_direct_file_holds_what_another_does(tmp_path, monkeypatch, refused):
    layout = {
        "paged": (torch.float32, (256, 1024)), "odd": (torch.float32, (70_001,)), "bytes": (torch.int8, (1 << 19,)),
        "few": (torch.int64, (3,)), "none": (torch.float32, (0, 4)),
    }  # fmt: skip
    if refused == "when opened":
        monkeypatch.setattr(tensor_file, "open_direct", lambda *_, **__: None)
    moved = watch_calls(monkeypatch, refuse=refused == "when used")
    tensors = {name: random_tensor(*kind, seed) for seed, (name, kind) in enumerate(layout.items())}
    with TensorFile.create(tmp_path / "a", layout) as plain, TensorFile.create(tmp_path / "b", layout, direct=True) as direct:
        for name, tensor in tensors.items():
            plain.write_from(name, tensor)
            paged = aligned_empty(tensor.shape, tensor.dtype, alignment=4096)
            direct.write_from(name, paged.copy_(tensor))
        direct.sync()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with TensorFile.open(tmp_path / "b", writable=True, direct=True) as file:
        for name, tensor in tensors.items():
            assert bits(file.read(name)) == bits(tensor)
        part = aligned_empty((128, 1024), torch.float32, alignment=4096).fill_(3)
        file.write_from("paged", part, start=128)
        # Memory that does not fill pages goes through the cache, and sees what went past it.
        elsewhere = torch.empty(256 * 1024 + 1)[1:].view(256, 1024)
        file.read_into("paged", elsewhere)
    expected = tensors["paged"].clone()
    expected[128:] = 3
    assert bits(elsewhere) == bits(expected)
    if refused == "not":
        assert set(moved) in ({1 << 20, 1 << 19}, set()), "only what fills pages, and nothing where there are no such transfers"
    else:
        assert not moved


def test_a_direct_file_leaves_the_page_cache_as_it_is(tmp_path, monkeypatch):
    moved = watch_calls(monkeypatch)
    with TensorFile.create(tmp_path / "x", {"x": (torch.float32, (4 << 20,))}, direct=True) as file:
        file.write_from("x", aligned_empty((4 << 20,), torch.float32, alignment=4096).zero_())
        file.read("x")
    if not moved:
        pytest.skip("the file system takes no direct transfers")
    assert cached_bytes(tmp_path / "x") <= 64 << 10


def test_elements_of_a_tensor_are_read_and_written_in_the_order_of_the_file(tmp_path: Path) -> None:
    with TensorFile.create(tmp_path / "x", {"x": (torch.float32, (3, 4)), "y": (torch.int64, ())}) as file:
        file.write_from("x", torch.arange(12.0).view(3, 4))
        file.write_elements("x", torch.tensor([-1.0, -2.0, -3.0]), 5)
        assert file.read("x", elements=slice(4, 9)).tolist() == [4.0, -1.0, -2.0, -3.0, 8.0]
        file.write_elements("y", torch.tensor(7), 0)
        assert file.read("y").item() == 7
        with pytest.raises(CheckpointError, match=r"holds 'x' as .*, asked for 3 elements of torch.float32 from element 10"):
            file.write_elements("x", torch.zeros(3), 10)
        with pytest.raises(CheckpointError, match=r"asked for 1 elements of torch.float64 from element 0"):
            file.write_elements("x", torch.zeros(1, dtype=torch.float64), 0)

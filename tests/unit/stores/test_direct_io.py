"""Tests of transfers past the page cache: every byte in its place, in whatever pieces; refusals; whole files."""

import errno
import fcntl
import os
import tempfile
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pagecache import watch_calls
from helpers.tensors import LAYOUTS, bits, random_tensor
from lowmem_pnn.errors import CheckpointError, DiskError
from lowmem_pnn.memory.aligned import aligned_empty, byte_view
from lowmem_pnn.stores import direct_io
from lowmem_pnn.stores.direct_io import Transfer, is_page_aligned
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.shard_file import ShardFile
from lowmem_pnn.stores.tensor_file import TensorFile

PAGE = 4096
# Bytes of a piece, and where in a page its memory starts beside its place in the file: 0 is as in the file.
PIECES = st.lists(st.tuples(st.integers(0, 3 * PAGE), st.sampled_from([0, 0, 0, 64, 1000])), min_size=1, max_size=6)


def cut(content: bytes, pieces: list[tuple[int, int]], begin: int) -> list[tuple[int, memoryview]]:
    """Pieces of memory that together hold some bytes."""
    result, offset = [], 0
    for size, shift in pieces:
        block = memoryview(byte_view(aligned_empty((size + 2 * PAGE,), torch.uint8, alignment=PAGE)))
        first = (begin + offset + shift) % PAGE
        memory = block[first : first + size]
        memory[:] = content[offset : offset + size]
        result.append((begin + offset, memory))
        offset += size
    return result


@given(pieces=PIECES.filter(lambda pieces: any(size for size, _ in pieces)), first_page=st.integers(0, 2), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=150)
def test_pieces_reach_the_file_and_come_back(pieces, first_page, seed):
    begin, size = first_page * PAGE, sum(size for size, _ in pieces)
    content = byte_view(random_tensor(torch.uint8, (size,), seed)).tobytes()
    with tempfile.NamedTemporaryFile() as file:
        # Through the page cache too a transfer does what it says.
        Transfer(cut(content, pieces, begin)).write(file.fileno())
        written = Path(file.name).read_bytes()
        assert written == bytes(begin) + content + bytes(-size % PAGE)
        targets = cut(bytes(size), pieces, begin)
        assert Transfer(targets).read(file.fileno()) == size
        assert b"".join(memory for _, memory in targets) == content
        os.truncate(file.name, begin + size // 2)
        assert Transfer(targets).read(file.fileno()) == size // 2


def test_pages_of_large_pieces_move_straight_and_in_one_call(tmp_path, monkeypatch):
    header, tensor, labels = 100, (1 << 20) + 3996, 77
    pieces = cut(os.urandom(header + tensor + labels), [(header, 5), (tensor, 0), (labels, 9)], 0)
    (tmp_path / "x").touch()
    descriptor = direct_io.open_direct(tmp_path / "x", writable=True)
    if descriptor is None:
        pytest.skip("the file system takes no direct transfers")
    moved = watch_calls(monkeypatch)
    transfer = Transfer(pieces)
    assert transfer.is_worthwhile
    transfer.write(descriptor)
    os.close(descriptor)
    assert moved == [(1 << 20) + 2 * PAGE]
    assert (tmp_path / "x").read_bytes()[: header + tensor + labels] == b"".join(memory for _, memory in pieces)


@pytest.mark.parametrize(
    ("pieces", "worth"),
    [
        ([(PAGE, 0), (1 << 20, 0), (100, 0)], True),
        ([(PAGE, 0), (1 << 17, 0)], False),  # small
        ([(PAGE, 0), (1 << 20, 64)], False),  # all of it would go through scratch
        ([(1 << 20, 0), (1 << 19, 64)], False),  # as much as nobody has planned
    ],
)
def test_small_and_shifted_transfers_are_not_worth_it(pieces, worth):
    content = bytes(sum(size for size, _ in pieces))
    assert Transfer(cut(content, pieces, 0)).is_worthwhile == worth


def test_a_write_that_the_system_cuts_short_is_done_again_through_the_cache(tmp_path, monkeypatch):
    pwritev, direct = os.pwritev, []

    def half(descriptor, segments, offset):
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return pwritev(descriptor, segments, offset)
        direct.append(offset)
        return pwritev(descriptor, [segments[0][: len(segments[0]) // 2]], offset) // PAGE * PAGE + 512

    tensors = {"x": aligned_empty((1 << 17,), torch.float32, alignment=PAGE).fill_(1)}
    whole = ShardFile(tensors, {})
    monkeypatch.setattr(os, "pwritev", half)
    whole.write(tmp_path / "x").close()
    assert direct == [0]
    assert f"{zlib.crc32((tmp_path / 'x').read_bytes()):08x}" == whole.crc32()


def test_a_short_write_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda *_: 512)
    with (tmp_path / "x").open("w+b") as file:
        assert not Transfer(cut(bytes(2 * PAGE), [(2 * PAGE, 0)], 0)).write(file.fileno())


def test_whole_pages_are_told(tmp_path):
    memory = byte_view(aligned_empty((3 * PAGE,), torch.uint8, alignment=PAGE)).data
    assert is_page_aligned(PAGE, memory)
    assert not is_page_aligned(64, memory)
    assert not is_page_aligned(PAGE, memory[:-1])
    assert not is_page_aligned(PAGE, memory[64 : PAGE + 64])


def test_a_file_system_without_direct_transfers_has_none(tmp_path, monkeypatch):
    def refuse(path, flags, *_):
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "x").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert direct_io.open_direct(tmp_path / "x", writable=True) is None
    with pytest.raises(FileNotFoundError):
        direct_io.open_direct(tmp_path / "gone", writable=False)
    monkeypatch.delattr(os, "O_DIRECT")
    assert direct_io.open_direct(tmp_path / "x", writable=True) is None


@given(layout=LAYOUTS, refuse=st.booleans(), shift=st.sampled_from([0, 64]), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=100)
def test_an_image_is_the_file_bit_for_bit(layout, refuse, shift, seed):
    tensors = {name: random_tensor(*kind, seed + number) for number, (name, kind) in enumerate(layout.items())}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_io, "LEAST_BYTES", 0)
        patch.setattr(direct_io, "_MOST_SCRATCH_BYTES", 1 << 30)
        watch_calls(patch, refuse=refuse)
        path, counter = Path(folder) / "x.safetensors", IoCounter()
        whole = ShardFile(tensors, {"about": "it"})
        with_sync = whole.write(path, counter)
        with_sync.sync()
        with_sync.close()
        assert counter.bytes_written == whole.nbytes == path.stat().st_size
        assert whole.crc32() == f"{zlib.crc32(path.read_bytes()):08x}"
        loaded = safetensors.torch.load_file(path)
        assert {name: bits(tensor) for name, tensor in loaded.items()} == {name: bits(t) for name, t in tensors.items()}
        with TensorFile.open(path) as file:
            assert (list(file.entries), file.metadata) == (list(layout), {"about": "it"})
        for past in (False, True):
            back = {name: aligned_empty(shape, dtype, alignment=PAGE) for name, (dtype, shape) in layout.items()}
            assert ShardFile(back, {"about": "it"}).read(path, counter, direct=past)
            assert {name: bits(tensor) for name, tensor in back.items()} == {name: bits(t) for name, t in tensors.items()}
        assert counter.bytes_read == 2 * whole.nbytes


@pytest.mark.parametrize("size", [5, 1 << 17])
def test_a_file_that_is_not_as_its_image_is_told(tmp_path, size):
    tensors = {"x": aligned_empty((size,), torch.float32, alignment=PAGE).fill_(1)}
    ShardFile(tensors, {"shard": "1"}).write(tmp_path / "x").close()
    for past in (False, True):
        assert ShardFile(tensors, {"shard": "1"}).read(tmp_path / "x", direct=past)
        assert not ShardFile(tensors, {"shard": "2"}).read(tmp_path / "x", direct=past)
        assert not ShardFile(tensors, {"shard": "1"}).read(tmp_path / "gone", direct=past)
        assert not ShardFile({"x": tensors["x"][:-1]}, {"shard": "1"}).read(tmp_path / "x", direct=past)
        os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size - 1)
        assert not ShardFile(tensors, {"shard": "1"}).read(tmp_path / "x", direct=past)
        os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size + 1)


@pytest.mark.parametrize("size", [5, 1 << 17])
def test_what_the_file_system_refuses_is_a_disk_error(tmp_path, monkeypatch, size):
    tensors = {"x": aligned_empty((size,), torch.float32, alignment=PAGE).fill_(1)}
    whole = ShardFile(tensors, {})
    whole.write(tmp_path / "x").close()
    with pytest.raises(CheckpointError, match=r"cannot create '.*x': it exists already"):
        whole.write(tmp_path / "x")
    with pytest.raises(DiskError, match=r"cannot write .*: no such file or directory"):
        whole.write(tmp_path / "gone" / "x")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DiskError, match=r"cannot read .*: input/output error"):
        whole.read(tmp_path / "x", direct=True)
    monkeypatch.setattr(os, "fsync", fail)
    file = whole.write(tmp_path / "y")
    with pytest.raises(DiskError, match=r"cannot sync it: input/output error \('.*y'\)"):
        file.sync()
    file.close()

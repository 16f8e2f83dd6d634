"""NumPy archives: what is stored is mapped and takes no memory, what is compressed is read; damage and change are noticed in both."""

import gc
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.datasets import NOWHERE
from lowmem_pnn.errors import DataError
from lowmem_pnn.memory.process_meter import private_bytes
from lowmem_pnn.samples.reader_process import SplitPickler
from lowmem_pnn.sources import npz_file
from lowmem_pnn.sources.datasets import find_dataset
from lowmem_pnn.sources.npz_file import mapped_member

# Two megabytes of samples.
X = np.random.RandomState(0).randint(0, 256, (512, 3, 32, 48)).astype(np.uint8)
Y = np.arange(512) % 7


def find(path: Path) -> Any:
    return find_dataset(f"npz:{path}", NOWHERE, "any")


@pytest.mark.parametrize(
    "x", [X, X.astype(np.float32), np.asfortranarray(X), X.transpose(0, 2, 3, 1)], ids=["bytes", "floats", "F", "HWC"]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_values_are_the_same_mapped_or_read(x: np.ndarray, compressed: bool, tmp_path: Path) -> None:
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", x_train=x, y_train=Y)
    split = find(tmp_path / "a.npz").train
    assert (mapped_member(split._x) is None) == compressed
    made, y = split.batch([5, 511, 0])
    expected = torch.from_numpy(np.array(x[[5, 511, 0]])).float()
    expected = expected if x.shape[1] == 3 else expected.movedim(-1, 1)
    assert torch.equal(made, expected / 255 if x.dtype == np.uint8 else expected)
    assert y.tolist() == [5, 0, 0]


def test_a_mapped_archive_takes_no_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.ones((300, 50_000), np.uint8), y_train=np.arange(300) % 2)
    find(tmp_path / "a.npz")
    gc.collect()
    before = private_bytes()
    dataset = find(tmp_path / "a.npz")
    dataset.train.batch(range(8))
    assert private_bytes() - before < 8 * 10**6


def test_a_mapped_split_is_sent_as_the_name_of_its_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y)
    split = find(tmp_path / "a.npz").train
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    SplitPickler(stream, protocol=5, buffer_callback=buffers.append).dump(split)
    assert stream.tell() + sum(buffer.raw().nbytes for buffer in buffers) < 10_000
    again = pickle.loads(stream.getvalue(), buffers=buffers)
    assert torch.equal(again.batch([7, 3])[0], split.batch([7, 3])[0])
    assert mapped_member(again._x) is not None


def test_maps_end_with_their_splits(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y)
    gc.collect()
    maps, descriptors = len(npz_file._MAPS), len(list(Path("/proc/self/fd").iterdir()))
    dataset = find(tmp_path / "a.npz")
    assert len(npz_file._MAPS) == maps + 1
    del dataset
    gc.collect()
    assert (len(npz_file._MAPS), len(list(Path("/proc/self/fd").iterdir()))) == (maps, descriptors)


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(
        DataError, match=r"a.npz cannot be read as .npz: BadZipFile: Bad CRC-32 for file 'x_train.npy'; save arrays"
    ):
        find(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 3])
    with pytest.raises(DataError, match=r"a.npz cannot be read as .npz: "):
        find(tmp_path / "a.npz")


@pytest.mark.parametrize("change", ["written", "shortened", "removed"])
def test_a_change_under_the_map_is_noticed(change: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x_train=X, y_train=Y)
    split = find(path).train
    split.batch([0])
    if change == "shortened":
        os.truncate(path, 1000)
    elif change == "removed":
        path.unlink()
    else:
        os.utime(path, ns=(1, 1))
    with pytest.raises(
        DataError, match=r"a.npz was changed while it is used: it had 2,\d+,\d+ bytes, it has .*; put it back and go on with"
    ):
        split.batch([0])

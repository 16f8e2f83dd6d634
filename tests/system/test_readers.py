"""Readers: what other processes read is what is read here, and whatever becomes of them is said in a line."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.datasets import NOWHERE, Drawn, Pairs, image_bytes
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.samples.augment import Augmenter
from lowmem_pnn.samples.normalization import Normalization
from lowmem_pnn.samples.prepared import PreparedSplit
from lowmem_pnn.samples.readers import Readers
from lowmem_pnn.sources.datasets import find_dataset
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.sources.subsets import as_floats, subset
from lowmem_pnn.sources.text import open_text

OWN = """
import pathlib
import subprocess
import torch
from neighbour import NUMBER

class Own:
    def __len__(self):
        return 9
    def __getitem__(self, index):
        if index == 7 and pathlib.Path(__file__).with_name("unplugged").exists():
            raise OSError("no such drive")
        if index == 6 and pathlib.Path(__file__).with_name("unplugged").exists():
            subprocess.run(["false"], check=True)
        return torch.full((2,), float(index + NUMBER)), index % 3

def load():
    return Own()
"""


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("readers")
    (folder / "own.py").write_text(OWN)
    (folder / "neighbour.py").write_text("NUMBER = 5\n")
    (folder / "a.txt").write_bytes(bytes(range(200)))
    own = find_dataset(f"{folder / 'own.py'}:load", NOWHERE, "any").train
    (folder / "unplugged").touch()
    images = image_bytes((3, 20, 30), num=23)
    pictures = from_torch((images, np.arange(23)), resize=Resize(16, 16, "crop"))
    return {
        "images": PreparedSplit(pictures, Augmenter("randaugment", 23, 4), Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.1), "")),
        "chosen": subset(from_torch(Pairs([(torch.tensor([[n, n + 1]]), n % 4) for n in range(12)])), np.array([7, 0, 3, 3, 11])),
        "drawn": PreparedSplit(from_torch(Drawn([(torch.rand(3), n % 4) for n in range(8)])), None, None, draws_seed=4),
        "text": open_text(folder / "a.txt", 8).train,
        "file": own,
        "halves": from_torch((torch.rand(6, 3).to(torch.bfloat16), torch.arange(6))),
    }


@pytest.fixture(scope="module")
def served(splits: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with Readers(splits, 3, "a") as readers:
        yield dict(readers.serve())


NUMBERS = [[0], [3, 1, 4, 1], [2, 0, 1, 3, 4], [4, 3]]


@pytest.mark.parametrize("name", ["images", "chosen", "drawn", "text", "file", "halves"])
@pytest.mark.parametrize("numbers", NUMBERS, ids=len)
def test_samples_are_the_same_wherever_they_are_read(name: str, numbers: list[int], splits: Any, served: Any) -> None:
    for ours, theirs in zip(splits[name].batch(numbers), served[name].batch(numbers), strict=True):
        assert (theirs.dtype, theirs.is_contiguous()) == (ours.dtype, True)
        assert torch.equal(ours, theirs)
    assert len(served[name]) == len(splits[name])


def test_augmented_samples_are_the_same_too(splits: Any, served: Any) -> None:
    for key in (("epoch", 0), ("epoch", 1), ("view", 0)):
        numbers = np.random.RandomState(0).permutation(23)
        assert torch.equal(splits["images"].batch(numbers, key)[0], served["images"].batch(numbers, key)[0])
        assert torch.equal(splits["drawn"].batch(numbers % 8, key)[0], served["drawn"].batch(numbers % 8, key)[0])


def test_integers_that_are_numbers_are_so_there(splits: Any, served: Any) -> None:
    theirs, ours = (as_floats(parts["chosen"]).batch([0, 1, 2]) for parts in (served, splits))
    assert (ours[0].dtype, theirs[0].dtype) == (torch.float32, torch.float32)
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize(("index", "error"), [(7, "OSError: no such drive"), (6, "CalledProcessError: Command .* exit status 1")])
def test_an_error_is_the_same_line_and_reading_goes_on(index: int, error: str, splits: Any, served: Any) -> None:
    with pytest.raises(DataError) as here:
        splits["file"].batch([8, index, 0, 1])
    with pytest.raises(DataError, match=f"cannot be read: {error}.*; repair it or leave it out") as there:
        served["file"].batch([8, index, 0, 1])
    assert str(here.value) == str(there.value)
    assert served["file"].batch([8, 0])[1].tolist() == [2, 0]
    with pytest.raises(IndexError, match=r"indices from 9 to 9 for 9 samples"):
        served["file"].batch([9])


def test_memory_of_the_processes_is_known(served: Any) -> None:
    served["images"].batch([0, 1, 2])
    assert served["images"].readers.peak_bytes > 50 * 10**6


def test_what_cannot_be_sent_is_said_before_a_process_is_started() -> None:
    class Local(Pairs):
        pass

    before = _num_descriptors()
    with pytest.raises(
        ConfigError, match=r"^--workers 2: data a cannot be sent to another process: .*Local.*; define its class and"
    ):
        Readers({"train": from_torch(Local([(torch.zeros(2), 0)]))}, 2, "a").__enter__()
    assert _num_descriptors() == before


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
from helpers.datasets import Pairs
from lowmem_pnn.samples.readers import Readers
from lowmem_pnn.sources.map_split import from_torch

class Slow(Pairs):
    def __getitem__(self, index):
        if index == 3:  # none of those that are looked at beforehand
            time.sleep(60)
        return super().__getitem__(index)

if __name__ == "__main__":
    with Readers({{"train": from_torch(Slow([(torch.zeros(2), n) for n in range(64)]), num_classes=64)}}, 2, "a") as readers:
        split = readers.serve()["train"]
        print(split.batch([2, 1])[1].tolist(), *readers._pids, flush=True)
        split.batch([0, 3])
"""


def test_they_die_with_the_trainer_whatever_they_are_at(tmp_path: Path) -> None:
    """The data set is defined in the script itself, and one process is in the middle of a sample."""
    (tmp_path / "script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parents[2])))
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as trainer:
        assert trainer.stdout is not None
        first, second, *pids = trainer.stdout.readline().split()
        assert (first, second, len(pids)) == ("[2,", "1]", 2)
        trainer.kill()
    _wait_until_gone([int(pid) for pid in pids])


def test_one_that_dies_is_said_and_none_is_left_behind(splits: dict[str, Any]) -> None:
    with Readers(splits, 3, "a") as readers:
        served: Any = dict(readers.serve())
        served["file"].batch([0, 1])
        pids = list(readers._pids)
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(
            DataError, match=r"^a process that reads samples of data a died of SIGKILL; give fewer --workers where host memory"
        ):
            served["file"].batch([0, 1])
        before = _num_descriptors()
        readers.close()
        assert _num_descriptors() == before - 3
    _wait_until_gone(pids)


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while not all(map(_is_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(map(_is_gone, pids))


def _is_gone(pid: int) -> bool:
    try:
        # One that nobody has waited for is no more.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))

"""Batches that are read in pieces."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lowmem_pnn.samples import prepared
from lowmem_pnn.samples.augment import Augmenter
from lowmem_pnn.samples.normalization import Normalization
from lowmem_pnn.samples.prepared import BatchReader, PreparedSplit
from lowmem_pnn.sources.subsets import RenumberedSplit

KEY = ("epoch", 3)


class Images:
    """Split of random images, which notes how many are read at once."""

    def __init__(self, number: int, shape: tuple[int, ...]) -> None:
        self.x, self.y = torch.rand(number, *shape), torch.arange(number)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        self.read.append(len(indices))
        return self.x[indices], self.y[indices]


def test_a_batch_of_large_samples_is_read_in_pieces_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images(20, (3, 8, 8))
    split = PreparedSplit(images, Augmenter("basic", 20, 7), Normalization((0.5,) * 3, (0.2,) * 3, ""))
    order = np.random.default_rng(1).permutation(20)
    whole = split.batch(order, KEY)
    images.read.clear()
    monkeypatch.setattr(prepared, "_PIECE_BYTES", 3 * images.x[0].nbytes)
    reader = BatchReader(split)
    for _ in range(2):
        (x,), labels = reader.read(order, KEY)
        assert torch.equal(x, whole[0]), "augmentation follows from the sample alone"
        assert torch.equal(labels, whole[1])
        assert x.is_contiguous()
    assert images.read == [1, *[3] * 6, 1, *[3] * 6, 2]


def test_a_batch_of_small_samples_is_read_at_once() -> None:
    images = Images(20, (2,))
    reader = BatchReader(images)
    for _ in range(2):
        (x,), _ = reader.read(np.arange(20), None)
        assert torch.equal(x, images.x)
    assert images.read == [1, 19, 20]


def test_a_batch_that_other_processes_read_is_theirs_to_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images(20, (3, 8, 8))
    images.readers = object()  # type: ignore[attr-defined]
    monkeypatch.setattr(prepared, "_PIECE_BYTES", 1)
    BatchReader(RenumberedSplit(images, torch.arange(20))).read(np.arange(20), None)
    assert images.read == [20]

"""Feeds: where a visit's samples come from, in which order, read one batch ahead."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.engine.stalls import Kind
from lowmem_pnn.seeds import permutation_of
from lowmem_pnn.sources.augment import RandomCropFlip
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.stores.activations import ActivationStore

# Samples that are read at once where only their labels are wanted.
_LABELS_AT_ONCE = 64

# A word and a number: an epoch, or a view.
Drawn = tuple[str, int]
Batch = tuple[tuple[Tensor, ...], Tensor]


class Loader(Protocol):
    """Samples at one boundary of the chain, with their labels."""

    num_samples: int

    waits_for: Kind
    """What a batch that is not there yet is waited for as."""

    def batches(
        self, batch_size: int, *, shuffle: bool, epoch: int = 0, start: int = 0, drawn: Drawn | None = None
    ) -> Iterator[Batch]:
        """Iterate over an epoch.

        Args:
            batch_size: samples a batch; the last may be short.
            shuffle: in an order that follows from the seed and the epoch, else in the loader's own order.
            epoch: from 0.
            start: batches to skip.
            drawn: what the augmentation of images follows from, besides the seed; None for images as they are. Only the data set's
                own loader has images.

        Yields:
            The boundary tensors, each (B, ...), on the host, and the labels (B,) int64.
        """
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


class DatasetLoader:
    """The data set itself: the first boundary.

    Args:
        split: the samples.
        seed: of the run.
        pool: one thread that reads the next batch while this one is used.
        mix: the loader's own order is a fixed permutation, instead of the data set's. What is written in that order can be read in
            sequence and still mixes the classes of a data set that is sorted by class.
        phase: a word that the order of shuffled epochs follows from.
        augments: images are augmented where `drawn` says what by.
    """

    waits_for: Kind = "data"

    def __init__(
        self, split: Split, seed: int, pool: Executor, *, mix: bool, phase: str = "epoch", augments: bool = False
    ) -> None:
        self._augments = augments
        self._split = split
        self._seed = seed
        self._pool = pool
        self.num_samples = len(split)
        self._mix = mix
        self._phase = phase

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        epoch: int = 0,
        start: int = 0,
        drawn: Drawn | None = None,
        macro_batch: slice = slice(None),
    ) -> Iterator[Batch]:
        """See `Loader`; of the epoch's order only a macro_batch. `exact` and `backprop` of one seed see the same batches."""
        order = self._order(shuffle, epoch)[macro_batch]
        crops = RandomCropFlip(self.num_samples, self._seed, drawn) if self._augments and drawn is not None else None

        def read(numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
            samples, labels = self._split.batch(numbers)
            return samples if crops is None else crops(samples, numbers), labels

        ahead: Future[tuple[Tensor, Tensor]] | None = None
        for begin in range(start * batch_size, len(order), batch_size):
            now = ahead or self._pool.submit(read, order[begin : begin + batch_size])
            following = order[begin + batch_size : begin + 2 * batch_size]
            ahead = self._pool.submit(read, following) if len(following) else None
            samples, labels = now.result()
            del now  # it holds the batch
            batch = (samples,), labels
            del samples, labels
            yield batch
            del batch  # or three would be there while the next one is waited for

    def close(self) -> None:
        """Nothing is held between epochs."""

    def _order(self, shuffle: bool, epoch: int) -> npt.NDArray[np.int64]:
        if shuffle:
            return permutation_of(self.num_samples, self._seed, self._phase, epoch)
        return permutation_of(self.num_samples, self._seed, "own order") if self._mix else np.arange(self.num_samples)


class SyntheticLabelLoader:
    """Codes of the samples' classes: any boundary that has synthetic labels.

    Args:
        split: whose labels they are.
        codes: (classes, ...) for each tensor of the boundary, on the host.
        seed: of the run.
    """

    waits_for: Kind = "data"

    def __init__(self, split: Split, codes: tuple[Tensor, ...], seed: int) -> None:
        self._codes = codes
        self._seed = seed
        self.num_samples = len(split)
        self._labels = torch.empty(self.num_samples, dtype=torch.int64)
        for begin in range(0, self.num_samples, _LABELS_AT_ONCE):
            numbers = np.arange(begin, min(begin + _LABELS_AT_ONCE, self.num_samples))
            self._labels[begin : begin + len(numbers)] = split.batch(numbers)[1]

    def batches(
        self, batch_size: int, *, shuffle: bool, epoch: int = 0, start: int = 0, drawn: Drawn | None = None
    ) -> Iterator[Batch]:
        """See `Loader`; labels come in the order in which `DatasetLoader` has them."""
        place = ("epoch", epoch) if shuffle else ("own order",)
        order = permutation_of(self.num_samples, self._seed, *place)
        for begin in range(start * batch_size, self.num_samples, batch_size):
            labels = self._labels[torch.from_numpy(order[begin : begin + batch_size])]
            yield tuple(codes[labels] for codes in self._codes), labels

    def close(self) -> None:
        """Nothing is open."""


class ShardLoader:
    """Boundary activations in shards: every boundary but the first.

    Args:
        store: complete.
        seed: of the run.
        pool: one thread that reads the next shards while these are used.
        window_bytes: memory for shards, in use and read ahead together.
    """

    waits_for: Kind = "disk"

    def __init__(self, store: ActivationStore, seed: int, pool: Executor, window_bytes: int) -> None:
        self._store = store
        self._seed = seed
        self._pool = pool
        self._window_bytes = window_bytes
        self.num_samples = store.num_samples

    def batches(
        self, batch_size: int, *, shuffle: bool, epoch: int = 0, start: int = 0, drawn: Drawn | None = None
    ) -> Iterator[Batch]:
        """See `Loader`."""
        return self._store.batches(
            batch_size,
            shuffle=shuffle,
            seed=self._seed,
            epoch=epoch,
            start=start,
            window_bytes=self._window_bytes,
            pool=self._pool,
        )

    def close(self) -> None:
        """Free the shards that are held between epochs."""
        self._store.close()


class MacroBatchLoader:
    """Some samples of one epoch of the data set, in that epoch's order: what a macro-batch learns from, and is written from.

    Args:
        loader: of the data set.
        shuffle: the epoch has an order of its own.
        epoch: from 0.
        macro_batch: which samples of its order.
        drawn: what their augmentation follows from.
    """

    waits_for: Kind = "data"

    def __init__(self, loader: DatasetLoader, shuffle: bool, epoch: int, macro_batch: slice, drawn: Drawn | None) -> None:
        self._feed, self._shuffle, self._epoch, self._stretch, self._drawn = loader, shuffle, epoch, macro_batch, drawn
        self.num_samples = len(range(*macro_batch.indices(loader.num_samples)))

    def batches(
        self, batch_size: int, *, shuffle: bool, epoch: int = 0, start: int = 0, drawn: Drawn | None = None
    ) -> Iterator[Batch]:
        """See `Loader`; whatever is asked, they come in the same order, augmented alike."""
        return self._feed.batches(
            batch_size, shuffle=self._shuffle, epoch=self._epoch, start=start, drawn=self._drawn, macro_batch=self._stretch
        )

    def close(self) -> None:
        """Close the data set's loader."""
        self._feed.close()


class StoredMacroBatchLoader:
    """Boundary activations of a macro-batch: as they were stored, which is the epoch's order.

    Args:
        loader: of the store.
    """

    waits_for: Kind = "disk"

    def __init__(self, loader: Loader) -> None:
        self._feed = loader
        self.num_samples = loader.num_samples

    def batches(
        self, batch_size: int, *, shuffle: bool, epoch: int = 0, start: int = 0, drawn: Drawn | None = None
    ) -> Iterator[Batch]:
        """See `Loader`; never shuffled once more."""
        return self._feed.batches(batch_size, shuffle=False, start=start)

    def close(self) -> None:
        """Close the store."""
        self._feed.close()


class ViewsLoader:
    """Several augmented copies of the training samples, one after the other, epoch by epoch; one is open at a time.

    Args:
        open_view: opens one.
        views: how many there are.
    """

    waits_for: Kind = "disk"

    def __init__(self, open_view: Callable[[int], Loader], views: int) -> None:
        self._open_view, self._views = open_view, views
        self._view, self._feed = 0, open_view(0)
        self.num_samples = self._feed.num_samples

    def batches(
        self, batch_size: int, *, shuffle: bool, epoch: int = 0, start: int = 0, drawn: Drawn | None = None
    ) -> Iterator[Batch]:
        """See `Loader`; epoch e reads view e modulo their number."""
        if (view := epoch % self._views) != self._view:
            self._feed.close()
            self._view, self._feed = view, self._open_view(view)
        return self._feed.batches(batch_size, shuffle=shuffle, epoch=epoch, start=start)

    def close(self) -> None:
        """Close the view that is open."""
        self._feed.close()

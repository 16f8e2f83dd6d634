"""Data loaders: the samples of a visit in batches, from the dataset, from synthetic labels or from stored activations."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.engine.stalls import StallKind
from lowmem_pnn.methods.sil import refuse_left_out
from lowmem_pnn.samples.augment import AugmentationKey
from lowmem_pnn.samples.batch_mixer import BatchMixer
from lowmem_pnn.samples.epochs import all_samples, epoch_order
from lowmem_pnn.samples.prepared import BatchReader
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.sources.subsets import reads_alone
from lowmem_pnn.stores.activations import ActivationStore, Batch

_T = TypeVar("_T")

# Samples that are read at once where only their labels are needed.
_LABELS_AT_ONCE = 64


class Loader(Protocol):
    """Samples at one boundary of the chain, with their labels."""

    num_samples: int
    """Number of samples in an epoch."""

    stall_kind: StallKind
    """Kind of stall that waiting for a batch counts as."""

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        epoch: int = 0,
        start: int = 0,
        augmentation_key: AugmentationKey | None = None,
    ) -> Iterator[Batch]:
        """Iterate over the batches of an epoch.

        Args:
            batch_size: samples per batch; the last batch may have fewer.
            shuffle: whether samples come in an order that follows from the seed and the epoch, instead of the loader's own order.
            epoch: number of the epoch, from 0.
            start: batches to skip.
            augmentation_key: key of what is random in samples; None for samples as they are. Loaders of activations ignore it.

        Yields:
            The boundary tensors, each (B, ...), on the host, and the labels (B, ...) int64.
        """
        ...

    def close(self) -> None:
        """Close the files, and free the memory, that are held between epochs."""
        ...


def read_ahead(
    pool: Executor | None, read: Callable[[npt.NDArray[np.int64]], _T], order: npt.NDArray[np.int64], batch_size: int, start: int
) -> Iterator[_T]:
    """Iterate over batches that are read in another thread, one ahead: nothing but two batches is in memory.

    Args:
        pool: pool of one thread, which reads; None to read a batch when it is asked for, in the thread that asks.
        read: reads a batch of samples by their numbers.
        order: numbers of all samples, in the order in which they come.
        batch_size: samples per batch; the last batch may have fewer.
        start: batches to skip.
    """
    ahead: Future[_T] | None = None
    places = range(start * batch_size, len(order), batch_size)
    if pool is None:
        yield from (read(order[begin : begin + batch_size]) for begin in places)
        return
    for begin in places:
        now = ahead or pool.submit(read, order[begin : begin + batch_size])
        following = order[begin + batch_size : begin + 2 * batch_size]
        ahead = pool.submit(read, following) if len(following) else None
        batch = now.result()
        del now  # it holds the batch
        yield batch
        del batch  # or three would be there while the next one is waited for


class DatasetLoader:
    """Loader of the dataset itself: the first boundary. It reads one batch ahead, unless the dataset draws from the generators of training.

    Args:
        split: samples of one part of the data.
        seed: seed of the run.
        pool: pool of one thread, which reads the next batch while the present one is used.
        permuted: whether the loader's own order is a fixed permutation, instead of the dataset's order. A store that is written in
            this order mixes the classes of a dataset that is sorted by class, and can still be read in sequence.
        phase: word that seeds the order of shuffled epochs.
        augments: whether samples are augmented, or drawn anew, in epochs that have an augmentation key.
    """

    stall_kind: StallKind = "data"

    def __init__(
        self, split: Split, seed: int, pool: Executor, *, permuted: bool, phase: str = "epoch", augments: bool = False
    ) -> None:
        self.num_samples = len(split)
        self._split = split
        self._reader = BatchReader(split)
        self._seed = seed
        self._pool = None if reads_alone(split) else pool
        self._permuted = permuted
        self._phase = phase
        self._augments = augments

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        epoch: int = 0,
        start: int = 0,
        augmentation_key: AugmentationKey | None = None,
        macro_batch: slice = slice(None),
    ) -> Iterator[Batch]:
        """Iterate as `Loader.batches` does, over all samples or a macro-batch: a range of the epoch's order.

        The methods `exact` and `backprop` see the same batches, where the seed is the same.
        """
        order = self._order(shuffle, epoch)[macro_batch]
        key = augmentation_key if self._augments else None

        yield from read_ahead(self._pool, lambda numbers: self._reader.read(numbers, key), order, batch_size, start)

    def close(self) -> None:
        """Do nothing: no file or memory is held between epochs."""

    def _order(self, shuffle: bool, epoch: int) -> npt.NDArray[np.int64]:
        if shuffle or self._permuted:
            return epoch_order(self._split, self._seed, self._phase, epoch, shuffle=shuffle)
        return np.arange(self.num_samples)


class MixedLoader:
    """Loader of the batches of another one, mixed (MixUp, CutMix) where they have an augmentation key.

    Args:
        loader: samples at any boundary, one tensor each.
        mixer: mixes a batch.
        batches_before: batches of the same epoch before the loader's first one, where that has the samples of a macro-batch.
    """

    def __init__(self, loader: Loader, mixer: BatchMixer, batches_before: int = 0) -> None:
        self.num_samples, self.stall_kind = loader.num_samples, loader.stall_kind
        self._loader, self._mixer, self._batches_before = loader, mixer, batches_before

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        epoch: int = 0,
        start: int = 0,
        augmentation_key: AugmentationKey | None = None,
    ) -> Iterator[Batch]:
        """Iterate as `Loader.batches` does; labels of batches that are mixed are shares between 0 and 1, (B, classes)."""
        batches = self._loader.batches(batch_size, shuffle=shuffle, epoch=epoch, start=start, augmentation_key=augmentation_key)
        if augmentation_key is None:
            yield from batches
            return
        number = self._batches_before + start
        for (x,), labels in batches:
            mixed, labels = self._mixer(x, labels, augmentation_key, number)
            del x
            yield (mixed,), labels
            number += 1
            del mixed, labels  # or one more would be there while the next one is waited for

    def close(self) -> None:
        """Close the other loader."""
        self._loader.close()


class SyntheticLabelLoader:
    """Loader of the class vectors of the samples: any boundary that has synthetic labels.

    Args:
        split: samples whose labels choose the class vectors.
        class_vectors: vectors (classes, ...) for each tensor of the boundary, on the host.
        seed: seed of the run.
    """

    stall_kind: StallKind = "data"

    def __init__(self, split: Split, class_vectors: tuple[Tensor, ...], seed: int) -> None:
        self.num_samples = len(split)
        self._class_vectors = class_vectors
        self._seed = seed
        self._split, count = split, all_samples(split)
        self._labels = torch.empty(count, dtype=torch.int64)
        for begin in range(0, count, _LABELS_AT_ONCE):
            numbers = np.arange(begin, min(begin + _LABELS_AT_ONCE, count))
            self._labels[begin : begin + len(numbers)] = split.batch(numbers)[1]
        refuse_left_out(self._labels, len(class_vectors[0]))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        epoch: int = 0,
        start: int = 0,
        augmentation_key: AugmentationKey | None = None,
    ) -> Iterator[Batch]:
        """Iterate as `Loader.batches` does, with the labels in the order in which a permuted `DatasetLoader` has them."""
        order = epoch_order(self._split, self._seed, "epoch", epoch, shuffle=shuffle)
        for begin in range(start * batch_size, self.num_samples, batch_size):
            labels = self._labels[torch.from_numpy(order[begin : begin + batch_size])]
            yield tuple(vectors[labels] for vectors in self._class_vectors), labels

    def close(self) -> None:
        """Do nothing: no file is open."""


class ShardLoader:
    """Loader of stored activations: every boundary but the first.

    Args:
        store: complete store of boundary activations.
        seed: seed of the run.
        pool: pool of one thread, which reads the next shards while the present ones are used.
        window_bytes: memory for the shards in use and the shards read ahead together.
    """

    stall_kind: StallKind = "disk"

    def __init__(self, store: ActivationStore, seed: int, pool: Executor, window_bytes: int) -> None:
        self.num_samples = store.num_samples
        self._store = store
        self._seed = seed
        self._pool = pool
        self._window_bytes = window_bytes

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        epoch: int = 0,
        start: int = 0,
        augmentation_key: AugmentationKey | None = None,
    ) -> Iterator[Batch]:
        """Iterate as `Loader.batches` does."""
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
    """Loader of some samples of one epoch of the dataset, in the order of that epoch.

    A macro-batch is learnt from and written in one and the same order, with the same augmentation, whatever `batches` is asked for.

    Args:
        loader: loader of the dataset.
        shuffle: whether the epoch has an order of its own.
        epoch: number of the epoch, from 0.
        macro_batch: range of the epoch's order.
        augmentation_key: key of the samples' augmentation.
    """

    stall_kind: StallKind = "data"

    def __init__(
        self, loader: DatasetLoader, shuffle: bool, epoch: int, macro_batch: slice, augmentation_key: AugmentationKey | None
    ) -> None:
        self.num_samples = len(range(*macro_batch.indices(loader.num_samples)))
        self._loader = loader
        self._shuffle = shuffle
        self._epoch = epoch
        self._macro_batch = macro_batch
        self._augmentation_key = augmentation_key

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        epoch: int = 0,
        start: int = 0,
        augmentation_key: AugmentationKey | None = None,
    ) -> Iterator[Batch]:
        """Iterate as `Loader.batches` does, in the macro-batch's own order; `shuffle`, `epoch` and the key are ignored."""
        return self._loader.batches(
            batch_size,
            shuffle=self._shuffle,
            epoch=self._epoch,
            start=start,
            augmentation_key=self._augmentation_key,
            macro_batch=self._macro_batch,
        )

    def close(self) -> None:
        """Close the dataset's loader."""
        self._loader.close()


class StoredMacroBatchLoader:
    """Loader of the stored activations of a macro-batch, in the stored order, which is the order of the epoch.

    Args:
        loader: loader of the store.
    """

    stall_kind: StallKind = "disk"

    def __init__(self, loader: Loader) -> None:
        self.num_samples = loader.num_samples
        self._loader = loader

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        epoch: int = 0,
        start: int = 0,
        augmentation_key: AugmentationKey | None = None,
    ) -> Iterator[Batch]:
        """Iterate as `Loader.batches` does, in the stored order; `shuffle` is ignored, since the samples were shuffled before."""
        return self._loader.batches(batch_size, shuffle=False, start=start)

    def close(self) -> None:
        """Close the store's loader."""
        self._loader.close()


class ViewsLoader:
    """Loader of several augmented copies (views) of the training samples: one view per epoch, in turn, one open at a time.

    Args:
        open_view: function that opens the loader of the view with a number.
        num_views: number of views.
    """

    stall_kind: StallKind = "disk"

    def __init__(self, open_view: Callable[[int], Loader], num_views: int) -> None:
        self._open_view = open_view
        self._num_views = num_views
        self._view, self._loader = 0, open_view(0)
        self.num_samples = self._loader.num_samples

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        epoch: int = 0,
        start: int = 0,
        augmentation_key: AugmentationKey | None = None,
    ) -> Iterator[Batch]:
        """Iterate as `Loader.batches` does; epoch e reads view e modulo the number of views."""
        if (view := epoch % self._num_views) != self._view:
            self._loader.close()
            self._view, self._loader = view, self._open_view(view)
        return self._loader.batches(batch_size, shuffle=shuffle, epoch=epoch, start=start)

    def close(self) -> None:
        """Close the view that is open."""
        self._loader.close()

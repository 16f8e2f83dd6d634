"""A store of boundary activations: what one partition leaves for the next, in shards, with the labels.

The layout on disk is in `shards.py`. A *window* is a group of shards that is in memory at one time: batches are drawn from one
window after the other, while the next is read.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.memory.aligned import PAGE_BYTES, aligned_empty, memory_of
from lowmem_pnn.memory.pool import MemoryPool
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.disk import CHUNK_BYTES, IoCounter, outgrows_page_cache
from lowmem_pnn.stores.encoding import KeptAs, decode
from lowmem_pnn.stores.header import TensorLayout
from lowmem_pnn.stores.shard_file import ShardFile
from lowmem_pnn.stores.shards import (
    Index,
    allocate,
    by_tensor,
    describe_all,
    read_index,
    remedy,
    resident_bytes,
    shard_layout,
    shard_metadata,
    shard_name,
)
from lowmem_pnn.stores.tensor_file import TensorFile

__all__ = ["ActivationStore", "ActivationWriter"]

Batch = tuple[tuple[Tensor, ...], Tensor]
"""Boundary tensors, each (B, ...), and labels (B, *label_shape)."""


class ActivationStore:
    """Reads a complete store; get one from `open`.

    One thread uses it. Several iterations may be under way, each with windows of its own.

    Args:
        folder: of the store.
        index: of it.
        counter: counts the bytes read.
        direct: see `open`.
    """

    specs: tuple[TensorSpec, ...]
    """Of one sample's boundary tensors."""
    label_shape: tuple[int, ...]
    """Of one sample's labels."""
    num_samples: int
    shard_samples: int
    """Samples in every shard but the last, which may have fewer."""
    nbytes: int
    """Of all shards on the disk."""
    kept_as: KeptAs
    """What floating tensors are kept as, on the disk and in windows; batches have them in their own type."""
    cache: list[Tensor] | None
    """All samples as they are kept, in the stored order, the labels last, once the store was read into a window that held it whole."""

    def __init__(self, folder: Path, index: Index, counter: IoCounter | None, direct: bool | None = None) -> None:
        self.folder = folder
        self.specs = tuple(TensorSpec(shape, dtype) for dtype, shape in index.tensors)
        self.label_shape = index.label_shape
        self.kept_as = index.kept_as
        self.num_samples = index.num_samples
        self.shard_samples = index.shard_samples
        self.nbytes = sum(shard.bytes for shard in index.shards)
        self.cache = None
        self._shards = index.shards
        self._direct = outgrows_page_cache(self.nbytes) if direct is None else direct
        self._counter = counter

    @classmethod
    def open(
        cls, folder: Path, verify: bool = False, counter: IoCounter | None = None, *, direct: bool | None = None
    ) -> ActivationStore:
        """Open a store and check its index and the header of every shard.

        Args:
            folder: of the store.
            verify: also compare the checksum of every shard: reads them all.
            counter: counts the bytes read.
            direct: whether shards are read past the page cache, and not kept there for the next epoch; None to do so with stores
                that would fill it.

        Raises:
            CheckpointError: there is no index, or a shard is missing, of another size, in another's place, or holds something
                else than the index says; with `verify`, also if any byte was changed. The text names the file.
            DiskError: the file system refused.
        """
        folder = Path(folder)
        self = cls(folder, read_index(folder), counter, direct)
        for number, shard in enumerate(self._shards):
            with self._open_shard(number) as file:
                path, size = file.path, file.size
            if size != shard.bytes:
                raise CheckpointError(f"{str(path)!r} has {size} bytes, the index says {shard.bytes}; {remedy(folder)}")
            if verify:
                kind, found, wanted = shard.checksum(path, counter)
                if found != wanted:
                    raise CheckpointError(f"{str(path)!r} has {kind} {found}, the index says {wanted}; {remedy(folder)}")
        return self

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        epoch: int,
        start: int = 0,
        window_bytes: int,
        pool: Executor,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """Iterate over the samples.

        The order is a function of the arguments and the store's sizes alone. Shuffled, the shards come in a random order, and
        the samples of a window are mixed. A window takes half of `window_bytes`, as the next is read ahead into the other half,
        and at least one shard (the next is read ahead only if two fit). A store that fits `window_bytes` as a whole is one
        window, fully mixed, and stays in memory as `cache` until `close`.

        Args:
            batch_size: samples a batch; only the last may be short.
            shuffle: else the stored order.
            seed: of the run.
            epoch: from 0.
            start: batches to leave out at the beginning: the rest is exactly what a full iteration would give.
            window_bytes: memory for windows. The batches are in addition to it.
            pool: reads ahead.
            drop_last: leave a short last batch out.

        Yields:
            The boundary tensors, each (B, ...), and the labels (B, *label_shape): the receiver's alone as long as anything
            holds them, contiguous, from multiples of 64 bytes on.

        Raises:
            CheckpointError: a shard was damaged since the store was opened.
            DiskError: the file system refused.
        """
        assert batch_size > 0, "a batch has at least one sample"
        assert start >= 0, "batches are counted from 0"
        stop = self.num_samples - (self.num_samples % batch_size if drop_last else 0)
        position = min(start * batch_size, stop)
        batch: list[Tensor] = []
        filled = 0
        # Two batches, as many as wait at most: fresh memory for each would take longer than filling it.
        blocks = MemoryPool(2 * resident_bytes(self.specs, batch_size, self.label_shape))
        with closing(self._windows(seed if shuffle else None, epoch, position, stop, window_bytes, pool)) as windows:
            for window in windows:
                while position < min(window.end, stop):
                    if not batch:
                        size, filled = min(batch_size, stop - position), 0
                        batch = allocate(self.specs, size, self.label_shape, blocks.empty)
                    count = min(size - filled, window.end - position)
                    window.copy_rows(position, count, batch, filled)
                    filled += count
                    position += count
                    if filled == size:
                        yield _hand_over(batch)

    def close(self) -> None:
        """Free the cache. The store can be read again."""
        self.cache = None

    def _windows(
        self, seed: int | None, epoch: int, first: int, stop: int, window_bytes: int, pool: Executor
    ) -> Generator[_Window, None, None]:
        """The windows that hold samples [first, stop) of an order."""
        if first >= stop:
            return
        if resident_bytes(self.specs, self.num_samples, self.label_shape, self.kept_as) <= window_bytes:
            if self.cache is None:
                tensors = self._allocate(self.num_samples)
                self._load(range(len(self._shards)), tensors, self._images(range(len(self._shards)), tensors))
                # Only now, so that an exception on the way leaves no half-filled cache.
                self.cache = tensors
            yield self._window(self.cache, 0, self.num_samples, _order(self.num_samples, seed, "samples", epoch))
            return
        self.close()
        shard_order = _order(len(self._shards), seed, "shards", epoch)
        shards: list[int] = list(range(len(self._shards))) if shard_order is None else shard_order.tolist()
        shard_bytes = resident_bytes(self.specs, self.shard_samples, self.label_shape, self.kept_as)
        per_window = max(1, window_bytes // 2 // shard_bytes)
        groups = [shards[begin : begin + per_window] for begin in range(0, len(shards), per_window)]
        bases = [0, *accumulate(sum(self._shards[number].samples for number in group) for group in groups)]
        wanted = [number for number in range(len(groups)) if bases[number] < stop and first < bases[number + 1]]

        def load(number: int, tensors: list[Tensor], images: list[ShardFile]) -> _Window:
            self._load(groups[number], tensors, images)
            base, end = bases[number], bases[number + 1]
            return self._window(tensors, base, end, _order(end - base, seed, "window", epoch, number))

        rows = min(per_window * self.shard_samples, self.num_samples)
        read_ahead = len(wanted) > 1 and 2 * per_window * shard_bytes <= window_bytes
        now = self._allocate(rows)
        following = self._allocate(rows) if read_ahead else now
        ahead: Future[_Window] | None = None
        try:
            for number, next_number in zip(wanted, [*wanted[1:], None], strict=True):
                window = ahead.result() if ahead is not None else load(number, now, self._images(groups[number], now))
                if read_ahead:
                    ahead = None
                    if next_number is not None:
                        ahead = pool.submit(load, next_number, following, self._images(groups[next_number], following))
                    now, following = following, now
                yield window
        finally:
            # A job that ran on would use memory that the caller takes for free.
            if ahead is not None and not ahead.cancel():
                wait([ahead])

    def _window(self, tensors: list[Tensor], base: int, end: int, order: npt.NDArray[np.int64] | None) -> _Window:
        return _Window(by_tensor(tensors, self.specs, self.kept_as), base, end, order)

    def _layout(self, num_samples: int) -> dict[str, TensorLayout]:
        return shard_layout(self.specs, num_samples, self.label_shape, self.kept_as)

    def _allocate(self, num_samples: int) -> list[Tensor]:
        return [aligned_empty(shape, dtype, alignment=PAGE_BYTES) for dtype, shape in self._layout(num_samples).values()]

    def _images(self, numbers: Sequence[int], tensors: list[Tensor]) -> list[ShardFile]:
        """Whole shards, in consecutive rows: what reading them can have done before."""
        images, row = [], 0
        for number in numbers:
            count = self._shards[number].samples
            rows = {name: tensor[row : row + count] for name, tensor in zip(self._layout(count), tensors, strict=True)}
            images.append(ShardFile(rows, shard_metadata(number)))
            row += count
        return images

    def _load(self, numbers: Sequence[int], tensors: list[Tensor], images: list[ShardFile]) -> None:
        """Read whole shards into consecutive rows."""
        row = 0
        for number, image in zip(numbers, images, strict=True):
            count = self._shards[number].samples
            if not image.read(self.folder / shard_name(number), self._counter, direct=self._direct):
                self._load_by_tensors(number, [tensor[row : row + count] for tensor in tensors])
            row += count

    def _load_by_tensors(self, number: int, rows: list[Tensor]) -> None:
        """Read a shard that is not laid out as this version does it; of a damaged one say what is wrong."""
        with self._open_shard(number) as file:
            for name, tensor in zip(self._layout(self._shards[number].samples), rows, strict=True):
                file.read_into(name, tensor)
            if self._direct:
                file.drop_cache()

    def _open_shard(self, number: int) -> TensorFile:
        """Open a shard and compare its header with the index."""
        path = self.folder / shard_name(number)
        file = TensorFile.open(path, counter=self._counter, remedy=remedy(self.folder))
        wanted = self._layout(self._shards[number].samples)
        found = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        place = file.metadata.get("shard")
        if found == wanted and place == str(number):
            return file
        file.close()
        if found == wanted:
            fault = f"holds shard {place} of a store, in the place of shard {number}"
        else:
            fault = f"holds {describe_all(found.values())}, the index says {describe_all(wanted.values())}"
        raise CheckpointError(f"{str(path)!r} {fault}; {remedy(self.folder)}")


@dataclass
class _Window:
    """Samples [base, end) of an order, in memory."""

    tensors: list[list[Tensor]]
    """What keeps each boundary tensor, and last the labels."""
    base: int
    end: int
    order: npt.NDArray[np.int64] | None
    """The row of each sample; None where they are in order."""

    def copy_rows(self, position: int, count: int, batch: list[Tensor], row: int) -> None:
        """Copy samples [position, position + count) into rows of a batch."""
        first = position - self.base
        for kept, target in zip(self.tensors, batch, strict=True):
            if target.nbytes == 0:
                continue
            if kept[0].dtype == target.dtype:
                self._copy(kept[0], first, count, target[row : row + count])
            else:
                self._decode(kept, first, count, target[row : row + count])

    def _copy(self, source: Tensor, first: int, count: int, target: Tensor) -> None:
        # As rows of bytes every element type is copied bit for bit.
        source_bytes = memory_of(source).reshape(len(source), -1)
        target_bytes = memory_of(target).reshape(count, -1)
        if self.order is None:
            target_bytes[:] = source_bytes[first : first + count]
        else:
            # With mode="raise" numpy would go through a buffer of the output's size.
            np.take(source_bytes, self.order[first : first + count], axis=0, out=target_bytes, mode="clip")

    def _decode(self, kept: list[Tensor], first: int, count: int, target: Tensor) -> None:
        at_once = max(1, CHUNK_BYTES // sum(tensor[0].nbytes for tensor in kept))
        for begin in range(0, count, at_once):
            place = slice(first + begin, first + min(begin + at_once, count))
            if self.order is None:
                rows = [tensor[place] for tensor in kept]
            elif at_once == 1:  # a copy of a large sample would be memory that nobody has planned
                found = int(self.order[place.start])
                rows = [tensor[found : found + 1] for tensor in kept]
            else:
                index = torch.from_numpy(self.order[place])
                rows = [tensor.index_select(0, index) for tensor in kept]
            decode(rows, target[begin : begin + at_once])


def _order(size: int, seed: int | None, *place: int | str) -> npt.NDArray[np.int64] | None:
    """A permutation of [0, size), or None without a seed.

    Random words are all that is taken of numpy: its shuffles may change from release to release, these may not.
    """
    if seed is None:
        return None
    words = np.random.Philox(key=seed_of(seed, *place)).random_raw(size)
    return np.argsort(words, kind="stable")


def _hand_over(batch: list[Tensor]) -> Batch:
    """A batch's tensors; the list is left empty, so that only the receiver holds them."""
    *tensors, labels = batch
    batch.clear()
    return tuple(tensors), labels

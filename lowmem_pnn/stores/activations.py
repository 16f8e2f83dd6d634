"""Store of boundary activations: reads the outputs that one partition left for the next, with their labels, in batches.

The layout on disk is in `activation_index.py` and `shard_layout.py`, the reading ahead in `shard_prefetch.py`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import closing
from pathlib import Path

from torch import Tensor

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.memory.aligned import aligned_empty
from lowmem_pnn.memory.pool import MemoryPool
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.activation_index import Index, read_index
from lowmem_pnn.stores.disk import RUN_REMEDY, IoCounter, outgrows_page_cache
from lowmem_pnn.stores.encoding import Encoding
from lowmem_pnn.stores.shard_layout import allocate_batch, resident_bytes
from lowmem_pnn.stores.shard_prefetch import Window, prefetched_windows, shuffled_order
from lowmem_pnn.stores.shard_reader import ShardReader

Batch = tuple[tuple[Tensor, ...], Tensor]
"""Boundary tensors, each (B, ...), and labels (B, ...)."""


class ActivationStore:
    """Complete store of boundary activations, to be read; get one from `open`.

    One thread uses it. Several iterations may be under way, each with windows of its own.

    Args:
        folder: Folder of the store.
        index: Index of the store.
        counter: Counts the bytes read.
        direct: Whether shards are read past the page cache; see `open`.
    """

    specs: tuple[TensorSpec, ...]
    """Shapes and element types of one sample's boundary tensors."""
    labels: TensorSpec
    """Shape and element type of one sample's labels."""
    num_samples: int
    shard_samples: int
    """Samples in every shard but the last, which may have fewer."""
    nbytes: int
    """Bytes of all shards on the disk."""
    encoding: Encoding
    """How floating tensors are stored, on the disk and in windows; batches have them in their own type."""
    cache: list[Tensor] | None
    """All samples as they are stored, in the stored order, the labels last; None until a window has held the whole store."""

    def __init__(self, folder: Path, index: Index, counter: IoCounter | None, direct: bool | None = None) -> None:
        self.folder = folder
        self.labels = index.labels
        self.encoding = index.kept_as
        self.num_samples = index.num_samples
        self.shard_samples = index.shard_samples
        self.nbytes = sum(shard.bytes for shard in index.shards)
        self.cache = None
        self._reader = ShardReader(folder, index, counter, outgrows_page_cache(self.nbytes) if direct is None else direct)
        self.specs = self._reader.specs

    @classmethod
    def open(
        cls, folder: Path, verify: bool = False, counter: IoCounter | None = None, *, direct: bool | None = None
    ) -> ActivationStore:
        """Open a store, and check its index and the header of every shard.

        Args:
            folder: Folder of the store.
            verify: Whether to compare the checksum of every shard too, which reads all of them.
            counter: Counts the bytes read.
            direct: Whether shards are read past the page cache, and not kept there for the next epoch; None to do so with stores
                that would fill it.

        Raises:
            CheckpointError: There is no index, or a shard is missing, of another size, in another's place, or holds something
                else than the index says; with `verify`, also if any byte was changed. The text names the file.
            DiskError: The file system refused.
        """
        folder = Path(folder)
        index = read_index(folder)
        self = cls(folder, index, counter, direct)
        for number, shard in enumerate(index.shards):
            with self._reader.open(number) as file:
                path, size = file.path, file.size
            if size != shard.bytes:
                raise CheckpointError(f"{str(path)!r} has {size} bytes, the index says {shard.bytes}; {RUN_REMEDY}")
            if verify:
                kind, actual, expected = shard.checksums(path, counter)
                if actual != expected:
                    raise CheckpointError(f"{str(path)!r} has {kind} {actual}, the index says {expected}; {RUN_REMEDY}")
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
    ) -> Iterator[Batch]:
        """Iterate over the samples.

        The order is a function of the arguments and the store's sizes alone. Shuffled, the shards come in a random order, and
        the samples of a window are mixed. A window takes half of `window_bytes`, as the next is read ahead into the other half,
        and at least one shard (the next is read ahead only if two fit). A store that fits `window_bytes` as a whole is one
        window, fully mixed, and stays in memory as `cache` until `close`.

        Args:
            batch_size: Samples a batch; only the last batch may have fewer.
            shuffle: Whether to shuffle; else samples come in the stored order.
            seed: Seed of the run.
            epoch: Number of the epoch, from 0.
            start: Batches to leave out at the beginning: the rest is exactly what a full iteration would give.
            window_bytes: Memory for windows. The batches are in addition to it.
            pool: Runs the reading ahead.

        Yields:
            The boundary tensors, each (B, ...), and the labels (B, ...): the receiver's alone as long as anything
            holds them, contiguous, from multiples of 64 bytes on.

        Raises:
            CheckpointError: A shard was damaged since the store was opened.
            DiskError: The file system refused.
        """
        assert batch_size > 0, "a batch has at least one sample"
        assert start >= 0, "batches are counted from 0"
        stop = self.num_samples
        position = min(start * batch_size, stop)
        batch: list[Tensor] = []
        num_filled = 0
        # Fresh memory for each batch would take longer than filling it. No more than one is kept: the next is put together when its turn
        # comes, and blocks of full batches are not to stay beside a short last one.
        memory_pool = MemoryPool(resident_bytes(self.specs, batch_size, self.labels))
        with closing(self._windows(seed if shuffle else None, epoch, position, stop, window_bytes, pool)) as windows:
            for window in windows:
                while position < min(window.end, stop):
                    if not batch:
                        size, num_filled = min(batch_size, stop - position), 0
                        batch = allocate_batch(self.specs, size, self.labels, memory_pool.empty)
                    count = min(size - num_filled, window.end - position)
                    window.copy_rows(position, count, batch, num_filled)
                    num_filled += count
                    position += count
                    if num_filled == size:
                        yield _hand_over(batch)

    def rows(self, numbers: Iterable[int]) -> Batch:
        """Read single samples, by their places in the stored order, in the order that is asked for.

        Args:
            numbers: places of the samples, from 0.

        Raises:
            CheckpointError: A shard was damaged since the store was opened.
            DiskError: The file system refused.
        """
        assert self.encoding == "float32", "rows are read as they are"
        places: dict[int, list[tuple[int, int]]] = {}
        count = 0
        for number in numbers:
            shard, row = divmod(int(number), self.shard_samples)
            places.setdefault(shard, []).append((count, row))
            count += 1
        batch = allocate_batch(self.specs, count, self.labels, aligned_empty)
        names = [*map(str, range(len(self.specs))), "labels"]
        for shard, rows in sorted(places.items()):
            with self._reader.open(shard) as file:
                for place, row in rows:
                    for name, tensor in zip(names, batch, strict=True):
                        file.read_into(name, tensor[place : place + 1], row)
        return _hand_over(batch)

    def close(self) -> None:
        """Free the cache. The store can be read again."""
        self.cache = None

    def _windows(
        self, seed: int | None, epoch: int, first: int, stop: int, window_bytes: int, pool: Executor
    ) -> Generator[Window, None, None]:
        """Yield the windows that hold samples [first, stop) of an iteration's order."""
        if first >= stop:
            return
        if self._reader.resident_bytes(self.num_samples) <= window_bytes:
            if self.cache is None:
                tensors = self._reader.allocate(self.num_samples)
                shards = range(len(self._reader.samples))
                self._reader.read(shards, tensors, self._reader.prepare(shards, tensors))
                # Only now, so that an exception on the way leaves no half-filled cache.
                self.cache = tensors
            order = shuffled_order(self.num_samples, seed, "samples", epoch)
            yield Window(self._reader.group(self.cache), 0, self.num_samples, order)
            return
        self.close()
        yield from prefetched_windows(self._reader, seed, epoch, first, stop, window_bytes, pool)


def _hand_over(batch: list[Tensor]) -> Batch:
    """Take a batch's tensors out of their list, which is left empty, so that only the receiver holds them."""
    *tensors, labels = batch
    batch.clear()
    return tuple(tensors), labels

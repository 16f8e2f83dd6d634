"""The writer of a store of boundary activations: fills one shard while the one before goes to disk."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, Future, wait
from pathlib import Path
from types import TracebackType

from torch import Tensor

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.encoding import KeptAs, encode
from lowmem_pnn.stores.header import TensorLayout
from lowmem_pnn.stores.shard_file import NewFile, ShardFile
from lowmem_pnn.stores.shards import (
    Index,
    Shard,
    allocate_as_in_file,
    by_tensor,
    describe_all,
    make_empty,
    samples_per_shard,
    shard_layout,
    shard_metadata,
    shard_name,
    write_index,
)

# Files that wait for their sync, all open. A sync after each shard would have the writing wait for the drive to empty its cache;
# many at once share that.
_MAX_UNSYNCED = 128
# One is filled while the other is written.
_NUM_BUFFERS = 2


class ActivationWriter:
    """Writes a store, sample after sample, in order.

    One shard is filled while the pool writes the one before, past the page cache, and another thread computes its checksum. Shards
    are synced many at once, beside the writing or at the end. As a context it ends with `close`, after an exception with `abort`.

    Args:
        folder: must not exist yet, or hold an incomplete store, which is then emptied.
        specs: of one sample's boundary tensors.
        num_samples: that will be appended.
        shard_bytes: memory for one shard, of which two exist at a time; a sample larger than that gets a shard of its own.
        pool: writes behind, in the order of submission: one thread. `append` and `close` must not run on it.
        beside: other threads, for checksums and syncs beside it; None to have them on the one that writes.
        counter: counts the bytes written.
        label_shape: of one sample's labels.
        kept_as: what floating tensors are kept as, in memory and on the disk.

    Raises:
        CheckpointError: the folder holds a complete store, or files of something else.
        DiskError: the folder cannot be made.
    """

    shard_samples: int
    """Samples in every shard but the last, which may have fewer."""

    def __init__(
        self,
        folder: Path,
        specs: tuple[TensorSpec, ...],
        num_samples: int,
        shard_bytes: int,
        pool: Executor,
        counter: IoCounter | None = None,
        beside: Executor | None = None,
        label_shape: tuple[int, ...] = (),
        kept_as: KeptAs = "float32",
    ) -> None:
        assert num_samples > 0, "a store holds at least one sample"
        self.folder = Path(folder)
        self.num_samples = num_samples
        self.specs = tuple(specs)
        self.label_shape = tuple(label_shape)
        self.kept_as = kept_as
        self.shard_samples = samples_per_shard(self.specs, num_samples, shard_bytes, self.label_shape, kept_as)
        self._pool = pool
        self._beside = beside
        self._counter = counter
        make_empty(self.folder)
        self._filling: list[Tensor] = []
        # In the order of their writing, with their buffers.
        self._writing: deque[tuple[Future[None], list[Tensor]]] = deque()
        self._submitted = 0
        self._appended = 0
        self._shards: list[Shard] = []
        self._unsynced: list[NewFile] = []
        self._syncing: deque[Future[None]] = deque()
        self._state = "open"
        self._failure: BaseException | None = None

    def append(self, tensors: tuple[Tensor, ...], labels: Tensor) -> None:
        """Add samples. They are copied: the tensors may be reused at once.

        Args:
            tensors: each (B, ...) as its spec says, on any device.
            labels: (B, *label_shape) int64.

        Raises:
            CheckpointError: the tensors are not as the specs say, or the store is full.
            OverflowFault: a finite value cannot be kept as one.
            DiskError: an earlier shard could not be written.
        """
        assert self._state == "open", "the writer has ended"
        if self._failure is not None:
            raise self._failure
        self._check(tensors, labels)
        done = 0
        while done < len(labels):
            if not self._filling:
                self._filling = self._free_buffer()
            filled = self._appended % self.shard_samples
            count = min(len(labels) - done, self.shard_samples - filled)
            for kept, tensor in zip(by_tensor(self._filling, self.specs, self.kept_as), (*tensors, labels), strict=True):
                encode(tensor[done : done + count], [buffer[filled : filled + count] for buffer in kept])
            done += count
            self._appended += count
            if filled + count == self.shard_samples:
                self._flush(self.shard_samples)

    def close(self) -> None:
        """Write the last shard, wait until all are on the drive, then write the index.

        Raises:
            CheckpointError: not as many samples were appended as were announced.
            DiskError: a shard, or the index, could not be written.
        """
        if self._state == "closed":
            return
        assert self._state == "open", "the writer was aborted"
        try:
            if self._failure is not None:
                raise self._failure
            if self._appended != self.num_samples:
                raise CheckpointError(
                    f"{str(self.folder)!r} got {self._appended} of {self.num_samples} samples; append them all before the end"
                )
            if self._appended % self.shard_samples:
                self._flush(self._appended % self.shard_samples)
            while self._writing:
                self._wait_for_oldest()
            self._begin_sync()
            self._finish_syncs()
            tensors = tuple((spec.dtype, tuple(spec.shape)) for spec in self.specs)
            index = Index(self.num_samples, self.shard_samples, tensors, tuple(self._shards), self.label_shape, self.kept_as)
            write_index(self.folder, index)
        finally:
            self.abort()
        self._state = "closed"

    def abort(self) -> None:
        """Stop and free everything; what was written stays, without an index, until another writer empties the folder."""
        if self._state == "closed":
            return
        self._state = "aborted"
        wait([future for future, _ in self._writing])
        self._writing.clear()
        wait(self._syncing)
        self._syncing.clear()
        for file in self._unsynced:
            file.close()
        self._unsynced.clear()
        self._filling = []

    def __enter__(self) -> ActivationWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _check(self, tensors: tuple[Tensor, ...], labels: Tensor) -> None:
        given = [(tensor.dtype, tuple(tensor.shape)) for tensor in (*tensors, labels)]
        wanted = list(shard_layout(self.specs, len(labels), self.label_shape).values())
        if given != wanted:
            raise CheckpointError(
                f"{str(self.folder)!r} takes {describe_all(wanted)}, got {describe_all(given)}; "
                "give the model samples of one shape and element type"
            )
        if self._appended + len(labels) > self.num_samples:
            raise CheckpointError(
                f"{str(self.folder)!r} got {self._appended + len(labels)} samples, {self.num_samples} were announced; "
                "append each sample once"
            )

    def _flush(self, count: int) -> None:
        # All that can be done before its turn: the writing thread goes from one shard to the next.
        number = self._submitted
        tensors = {name: tensor[:count] for name, tensor in zip(self._layout(count), self._filling, strict=True)}
        image = ShardFile(tensors, shard_metadata(number))
        checksum = None if self._beside is None else self._beside.submit(image.crc32)
        try:
            file = NewFile.create(self.folder / shard_name(number), image.nbytes)
            future = self._pool.submit(self._write, image, file, count, checksum)
        except BaseException as error:
            self._failure = error
            raise
        self._writing.append((future, self._filling))
        self._submitted += 1
        self._filling = []

    def _free_buffer(self) -> list[Tensor]:
        """One of the two buffers, once what it held is written."""
        if len(self._writing) == _NUM_BUFFERS or (self._writing and self._writing[0][0].done()):
            return self._wait_for_oldest()
        return allocate_as_in_file(self._layout(self.shard_samples), shard_metadata(0))

    def _wait_for_oldest(self) -> list[Tensor]:
        """Until a shard is written; its buffer."""
        if self._failure is not None:
            raise self._failure
        future, buffer = self._writing.popleft()
        try:
            future.result()
        except BaseException as error:
            self._failure = error
            raise
        return buffer

    def _write(self, image: ShardFile, file: NewFile, count: int, checksum: Future[str] | None) -> None:
        """On the pool: write one shard."""
        self._unsynced.append(file)
        try:
            image.write_into(file, self._counter)
        finally:
            # The buffer is free when both are done with it.
            crc32 = image.crc32() if checksum is None else checksum.result()
        self._shards.append(Shard(file.path.name, count, image.nbytes, crc32))
        if len(self._unsynced) >= _MAX_UNSYNCED:
            self._finish_syncs()  # long done: no more files than twice the limit are open
            self._begin_sync()

    def _begin_sync(self) -> None:
        """Have what is written brought to the drive."""
        files, self._unsynced = self._unsynced, []
        for number, file in enumerate(files):
            if self._beside is not None:
                self._syncing.append(self._beside.submit(file.sync_and_close))
                continue
            try:
                file.sync_and_close()
            except BaseException:
                self._unsynced = files[number + 1 :]
                raise

    def _finish_syncs(self) -> None:
        while self._syncing:
            self._syncing.popleft().result()

    def _layout(self, num_samples: int) -> dict[str, TensorLayout]:
        return shard_layout(self.specs, num_samples, self.label_shape, self.kept_as)

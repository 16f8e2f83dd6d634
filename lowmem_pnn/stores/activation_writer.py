"""Writer of a store of boundary activations: fills one shard while the shard before it goes to disk (double buffering)."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lowmem_pnn.errors import CheckpointError, DiskError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.activation_index import Index, ShardEntry, make_empty_folder, write_index
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.encoding import Encoding, encode
from lowmem_pnn.stores.header import NAME_BY_DTYPE, TensorLayout
from lowmem_pnn.stores.shard_file import NewFile, ShardFile
from lowmem_pnn.stores.shard_layout import (
    CLASS_LABEL,
    allocate_as_in_file,
    describe_all,
    group_by_boundary_tensor,
    samples_per_shard,
    shard_layout,
    shard_metadata,
    shard_name,
)

# Files that wait for their sync, all open. A sync after each shard would make the writing wait for the drive to empty its cache;
# syncs of many files at once share that wait.
_MAX_UNSYNCED = 128
# One buffer is filled while the other is written.
_NUM_BUFFERS = 2


class ActivationWriter:
    """Writer of a store, sample after sample, in order.

    One shard is filled while the pool writes the one before, past the page cache, and another thread computes its checksum. Shards
    are synced many at once, during the writing or at the end. As a context the writer ends with `close`, after an exception with
    `abort`.

    Args:
        folder: Folder of the store; it must not exist yet, or hold an incomplete store, which is then emptied.
        specs: Shapes and element types of one sample's boundary tensors.
        num_samples: Number of samples that will be appended.
        shard_bytes: Memory for one shard, of which two exist at a time; a sample larger than that gets a shard of its own.
        pool: One thread, which writes shards in the order of submission. `append` and `close` must not run on it.
        helpers: Other threads, for checksums and syncs during the writing; None to have both on the thread that writes.
        counter: Counts the bytes written.
        labels: Shape and element type of one sample's labels.
        encoding: How floating tensors are stored, in memory and on the disk.

    Raises:
        CheckpointError: The folder holds a complete store, or files of something else.
        DiskError: The folder cannot be made.
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
        helpers: Executor | None = None,
        labels: TensorSpec = CLASS_LABEL,
        encoding: Encoding = "float32",
    ) -> None:
        assert num_samples > 0, "a store holds at least one sample"
        self.folder = Path(folder)
        self.num_samples = num_samples
        self.specs = tuple(specs)
        self.labels = labels
        self.encoding = encoding
        self.shard_samples = samples_per_shard(self.specs, num_samples, shard_bytes, labels, encoding)
        self._pool = pool
        self._helpers = helpers
        self._counter = counter
        make_empty_folder(self.folder)
        self._filling: list[Tensor] = []
        # Shards that are being written, in order, with their buffers.
        self._writing: deque[tuple[Future[None], list[Tensor]]] = deque()
        self._submitted = 0
        self._appended = 0
        self._shards: list[ShardEntry] = []
        self._unsynced: list[NewFile] = []
        self._syncing: deque[Future[None]] = deque()
        self._state = "open"
        self._failure: BaseException | None = None

    def append(self, tensors: tuple[Tensor, ...], labels: Tensor) -> None:
        """Append samples. They are copied: the tensors may be reused at once.

        Args:
            tensors: Boundary tensors, each (B, ...) as its spec says, on any device; one of a narrower floating type is widened, which
                changes no value: under autocast some kernels give another type where no gradient is wanted.
            labels: Labels (B, ...), as their spec says.

        Raises:
            CheckpointError: The tensors are not as the specs say, or the store is full.
            OverflowFault: A finite value is too large for the encoding.
            DiskError: An earlier shard could not be written.
        """
        assert self._state == "open", "the writer has ended"
        if self._failure is not None:
            raise self._failure
        if len(tensors) == len(self.specs):
            tensors = tuple(_widened(tensor, spec.dtype) for tensor, spec in zip(tensors, self.specs, strict=True))
        self._check(tensors, labels)
        done = 0
        while done < len(labels):
            if not self._filling:
                self._filling = self._free_buffer()
            row = self._appended % self.shard_samples
            count = min(len(labels) - done, self.shard_samples - row)
            buffers = group_by_boundary_tensor(self._filling, self.specs, self.encoding)
            for encoded, tensor in zip(buffers, (*tensors, labels), strict=True):
                encode(tensor[done : done + count], [buffer[row : row + count] for buffer in encoded])
            done += count
            self._appended += count
            if row + count == self.shard_samples:
                self._flush(self.shard_samples)

    def close(self) -> None:
        """Write the last shard, wait until all are on the drive, then write the index.

        Raises:
            CheckpointError: Fewer samples were appended than were announced.
            DiskError: A shard, or the index, could not be written.
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
            labels = self.labels.shape, NAME_BY_DTYPE[self.labels.dtype]
            index = Index(self.num_samples, self.shard_samples, tensors, tuple(self._shards), labels[0], self.encoding, labels[1])
            write_index(self.folder, index)
        finally:
            self.abort()
        self._state = "closed"

    def abort(self) -> None:
        """Stop, and free all memory; shards that were written stay, without an index, until another writer empties the folder."""
        if self._state == "closed":
            return
        self._state = "aborted"
        wait([future for future, _ in self._writing])
        self._writing.clear()
        wait(self._syncing)
        self._syncing.clear()
        for file in self._unsynced:
            with suppress(DiskError, OSError):  # the shards are given up: what has stopped the writing is to be heard of
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
        actual = [(tensor.dtype, tuple(tensor.shape)) for tensor in (*tensors, labels)]
        expected = list(shard_layout(self.specs, len(labels), self.labels).values())
        if actual != expected:
            raise CheckpointError(
                f"{str(self.folder)!r} takes {describe_all(expected)}, got {describe_all(actual)}; "
                "give the model samples of one shape and element type"
            )
        if self._appended + len(labels) > self.num_samples:
            raise CheckpointError(
                f"{str(self.folder)!r} got {self._appended + len(labels)} samples, {self.num_samples} were announced; "
                "append each sample once"
            )

    def _flush(self, count: int) -> None:
        # Here, and not on the writing thread, which goes from one shard to the next.
        number = self._submitted
        tensors = {name: tensor[:count] for name, tensor in zip(self._layout(count), self._filling, strict=True)}
        shard_file = ShardFile(tensors, shard_metadata(number))
        checksum = None if self._helpers is None else self._helpers.submit(shard_file.crc32)
        try:
            file = NewFile.create(self.folder / shard_name(number), shard_file.nbytes)
            future = self._pool.submit(self._write, shard_file, file, count, checksum)
        except BaseException as error:
            self._failure = error
            raise
        self._writing.append((future, self._filling))
        self._submitted += 1
        self._filling = []

    def _free_buffer(self) -> list[Tensor]:
        """Return one of the two buffers, once its shard is written."""
        if len(self._writing) == _NUM_BUFFERS or (self._writing and self._writing[0][0].done()):
            return self._wait_for_oldest()
        return allocate_as_in_file(self._layout(self.shard_samples), shard_metadata(0))

    def _wait_for_oldest(self) -> list[Tensor]:
        """Wait until the oldest shard is written, and return its buffer."""
        if self._failure is not None:
            raise self._failure
        future, buffer = self._writing.popleft()
        try:
            future.result()
        except BaseException as error:
            self._failure = error
            raise
        return buffer

    def _write(self, shard_file: ShardFile, file: NewFile, count: int, checksum: Future[str] | None) -> None:
        """Write one shard: on the pool."""
        self._unsynced.append(file)
        try:
            shard_file.write_into(file, self._counter)
        finally:
            # The buffer is free when both the writing and the checksum are done.
            crc32 = shard_file.crc32() if checksum is None else checksum.result()
        self._shards.append(ShardEntry(file.path.name, count, shard_file.nbytes, crc32))
        if len(self._unsynced) >= _MAX_UNSYNCED:
            self._finish_syncs()  # long done: no more files than twice the limit are open
            self._begin_sync()

    def _begin_sync(self) -> None:
        """Begin to sync the shards that are written."""
        files, self._unsynced = self._unsynced, []
        for number, file in enumerate(files):
            if self._helpers is not None:
                self._syncing.append(self._helpers.submit(file.sync_and_close))
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
        return shard_layout(self.specs, num_samples, self.labels, self.encoding)


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in a type that holds all values of its own; as it is where the type does not."""
    floats = tensor.dtype.is_floating_point and dtype.is_floating_point
    return tensor.to(dtype) if floats and tensor.dtype != dtype == torch.promote_types(tensor.dtype, dtype) else tensor

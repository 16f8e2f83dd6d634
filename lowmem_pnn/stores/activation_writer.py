"""The writer of a store of boundary activations: fills one shard while the one before goes to disk."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, Future, wait
from pathlib import Path
from types import TracebackType

from torch import Tensor

from lowmem_pnn.chain import TensorSpec
from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.stores.disk import IoCounter, outgrows_page_cache
from lowmem_pnn.stores.encoding import KeptAs, encode
from lowmem_pnn.stores.shards import (
    Index,
    Shard,
    allocate,
    by_tensor,
    describe_all,
    make_empty,
    resident_bytes,
    shard_layout,
    shard_name,
    write_index,
)
from lowmem_pnn.stores.tensorfile import TensorFile

_MAX_UNSYNCED = 8


class ActivationWriter:
    """Writes a store, sample after sample, in order.

    One shard is filled while the pool writes the one before, and another thread hashes that. As a context it ends with `close`, after
    an exception with `abort`.

    Args:
        folder: must not exist yet, or hold an incomplete store, which is then emptied.
        specs: of one sample's boundary tensors.
        num_samples: that will be appended.
        shard_bytes: memory for one shard, of which two exist at a time; a sample larger than that gets a shard of its own.
        pool: writes behind, in the order of submission: one thread. `append` and `close` must not run on it.
        hashing: another thread, which hashes beside it; None to hash on the one that writes.
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
        hashing: Executor | None = None,
        label_shape: tuple[int, ...] = (),
        kept_as: KeptAs = "float32",
    ) -> None:
        assert num_samples > 0, "a store holds at least one sample"
        self.folder = Path(folder)
        self.num_samples = num_samples
        self.specs = tuple(specs)
        self.label_shape = tuple(label_shape)
        self.kept_as = kept_as
        sample_bytes = resident_bytes(self.specs, 1, self.label_shape, kept_as)
        self.shard_samples = min(num_samples, max(1, shard_bytes // sample_bytes))
        self._pool = pool
        self._hashing = hashing
        self._counter = counter
        make_empty(self.folder)
        self._filling: list[Tensor] = []
        self._spare: list[Tensor] = []
        self._writing: tuple[Future[None], list[Tensor]] | None = None
        self._appended = 0
        self._shards: list[Shard] = []
        self._unsynced: deque[TensorFile] = deque()
        self._drop_pages = outgrows_page_cache(num_samples * sample_bytes)
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
                self._filling = self._spare or allocate(self.specs, self.shard_samples, self.label_shape, self.kept_as)
                self._spare = []
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
            self._wait()
            while self._unsynced:
                self._sync_oldest()
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
        if self._writing is not None:
            wait([self._writing[0]])
            self._writing = None
        while self._unsynced:
            self._unsynced.popleft().close()
        self._filling, self._spare = [], []

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
        self._wait()
        self._writing = self._pool.submit(self._write, self._filling, count), self._filling
        self._filling = []

    def _wait(self) -> None:
        """Until the shard before this one is written, and its buffer free."""
        if self._failure is not None:
            raise self._failure
        if self._writing is None:
            return
        (future, buffer), self._writing = self._writing, None
        try:
            future.result()
        except BaseException as error:
            self._failure = error
            raise
        self._spare = buffer

    def _write(self, buffer: list[Tensor], count: int) -> None:
        """On the pool: write one shard, and begin to sync it."""
        number = len(self._shards)
        path = self.folder / shard_name(number)
        layout = shard_layout(self.specs, count, self.label_shape, self.kept_as)
        file = TensorFile.create(path, layout, {"shard": str(number)}, counter=self._counter)
        self._unsynced.append(file)
        tensors = {name: tensor[:count] for name, tensor in zip(file.entries, buffer, strict=True)}
        hashed = None if self._hashing is None else self._hashing.submit(file.hash_with, tensors)
        try:
            for name, tensor in tensors.items():
                file.write_from(name, tensor)
        finally:
            # The buffer is free when both are done with it.
            digest = file.hash_with(tensors) if hashed is None else hashed.result()
        self._shards.append(Shard(path.name, count, path.stat().st_size, digest))
        # The drive works on it from here on, so that the sync, some shards later, has little left to wait for.
        file.drop_cache()
        if len(self._unsynced) > _MAX_UNSYNCED:
            self._sync_oldest()

    def _sync_oldest(self) -> None:
        with self._unsynced.popleft() as file:
            file.sync()
            if self._drop_pages:
                file.drop_cache()

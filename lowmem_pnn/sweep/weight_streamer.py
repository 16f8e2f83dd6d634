"""Weight streamer of a sweep: prefetches weights and optimizer state in a known order, and writes them behind.

A batch reads the values that the batch before it has written; each read waits for that write. Within a batch no file is read after it
was written.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from lowmem_pnn.device import Device
from lowmem_pnn.engine.prefetch import Prefetcher, Request, WriteBehind
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.memory.pool import MemoryPool
from lowmem_pnn.stores.keys import PartitionName
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.stores.tensor_reader import TensorReader
from lowmem_pnn.stores.weights import WeightStore

# Parts of a tensor that wait to be written, at most.
_PARTS_OF_STREAM = 4


@dataclass(frozen=True)
class Piece:
    """A tensor of the weight files, or some of its elements.

    Args:
        key: name of the tensor in the files.
        elements: elements, in the order of the file; None for all of them, in the tensor's shape.
    """

    key: str
    elements: slice | None = None


class WeightStreamer:
    """Moves weights and optimizer state between the weight files and the computing, in the background and in bounded memory.

    Args:
        weights: weight files of the run; their working files are changed in place.
        device: training device.
        threads: threads that read and write.
        stream_bytes: most bytes of tensors that wait to be taken.
        write_behind: queue of the writes; what waits in it is bounded by as many bytes.
    """

    def __init__(
        self, weights: WeightStore, device: Device, threads: WorkerThreads, stream_bytes: int, write_behind: WriteBehind
    ) -> None:
        self._weights = weights
        self._device = device
        self._threads = threads
        self._stalls = threads.stalls
        self._stream_bytes = stream_bytes
        self._pool = MemoryPool(0)
        self._write_behind = write_behind
        # Writes of the previous batch, and of the present one, by partition.
        self._previous_writes: dict[PartitionName, list[Future[None]]] = {}
        self._present_writes: dict[PartitionName, list[Future[None]]] = {}
        self._in_parts: list[Future[None]] = []
        self._reader: TensorReader | None = None
        self._prefetcher: Prefetcher | None = None

    @contextmanager
    def batch(self, pieces: Iterable[Piece]) -> Iterator[None]:
        """Prefetch the tensors of one batch inside the context.

        Args:
            pieces: all that will be taken, in that order.
        """
        # Tensors for another device pass through page-locked memory; where host and device are one, they stay in the pool's memory.
        with self._weights.tensor_reader(self._device.host_allocator() or self._pool.empty) as self._reader:
            self._prefetcher = Prefetcher(map(self._request, pieces), self._threads.read, self._stream_bytes)
            try:
                yield
            finally:
                self._prefetcher.close()
                self._prefetcher = None
        self._previous_writes, self._present_writes = self._present_writes, {}

    def take(self) -> Tensor:
        """Return the next tensor of the batch, on the host."""
        assert self._prefetcher is not None, "tensors are taken in a batch"
        with self._stalls.waiting("disk"):
            return self._prefetcher.take()

    def reserve_pool_for(self, keys: Iterable[str]) -> None:
        """Set the limit of the memory pool for a partition that is about to be loaded, and for the streams beside it.

        No more: a layer's optimizer state is let go before the layer before it goes back, whose kernels need the memory.

        Args:
            keys: names in weight files of the partition's tensors.
        """
        self._pool.set_limit(sum(map(self._weights.tensor_bytes, keys)) + 2 * self._stream_bytes)

    def keep_pool_to_limit(self) -> None:
        """Let memory of the pool go that a layer's step has left above the limit."""
        self._pool.keep_to_limit()

    @contextmanager
    def writing(self, partition: int) -> Iterator[tuple[TensorFile, bool]]:
        """Open a partition's working file inside the context; it is closed when the last write is done.

        Args:
            partition: number of the partition.

        Yields:
            The file, and whether it is new, without any of the partition's values.
        """
        # A resident weight must not change while it is being written.
        with self._stalls.waiting("disk"):
            self._wait_for_writes(partition)
        is_new = not self._weights.has_working_file(partition)
        if is_new and self._reader is not None:
            # The tensors that are still to be read are in the partition's previous file, not in the new one, which is empty.
            self._reader.open(partition)
        file = self._weights.writer(partition)
        try:
            yield file, is_new
        finally:
            # Also when an earlier write has failed, or something else: the file is closed, and what is under way is not replaced.
            self._write_behind.submit_close(file.close)

    def write(self, partition: int, file: TensorFile, key: str, tensor: Tensor, first: int | None = None) -> None:
        """Begin to write a tensor, or some elements of one; what is larger than the stream is written in parts.

        Args:
            partition: number of the partition whose file is open.
            file: file that `writing` opened.
            key: name of the tensor in the file.
            tensor: tensor on the device; it must not change before the next batch is over.
            first: first of the elements in the file's tensor; None for all of its elements.
        """
        if tensor.nbytes <= self._stream_bytes:
            self._write(partition, file, key, tensor, first)
            return
        flat = tensor.detach().view(-1)
        size = max(1, self._stream_bytes // (_PARTS_OF_STREAM * flat.element_size()))
        for begin in range(0, len(flat), size):
            self._write(partition, file, key, flat[begin : begin + size], (first or 0) + begin)
        if self._device.shares_host:
            # The parts hold the memory of all of it.
            self._in_parts = [*(part for part in self._in_parts if not part.done()), self._present_writes[partition][-1]]

    def finish_writes_in_parts(self) -> None:
        """Wait until tensors that are larger than the stream are written, before their memory is to be free."""
        with self._stalls.waiting("disk"):
            wait(self._in_parts)
        self._in_parts.clear()

    def _write(self, partition: int, file: TensorFile, key: str, tensor: Tensor, first: int | None) -> None:
        with self._stalls.waiting("copy"):  # for room
            download = self._device.download(tensor.detach())

        def write() -> None:
            if first is None:
                file.write_from(key, download.get())
            else:
                file.write_elements(key, download.get(), first)

        with self._stalls.waiting("disk"):  # for room
            future = self._write_behind.submit(download.nbytes, write)
        self._present_writes.setdefault(partition, []).append(future)

    def finish_writes(self) -> None:
        """Wait until everything is written.

        Raises:
            DiskError: a write failed.
        """
        with self._stalls.waiting("disk"):
            self._write_behind.wait()

    def free_memory(self) -> None:
        """Free the unused memory of the pool."""
        self._pool.clear()

    def close(self) -> None:
        """Wait for the writes under way, whatever comes of them, and free all memory."""
        self._write_behind.abandon()
        self._previous_writes, self._present_writes = {}, {}
        self._in_parts.clear()
        self.free_memory()

    def _request(self, piece: Piece) -> Request:
        nbytes = self._weights.tensor_bytes(piece.key, piece.elements)
        # On the host a tensor that is larger than the stream would be in memory twice: it is read into its place, when that is free.
        early = nbytes <= self._stream_bytes or not self._device.shares_host
        return Request(nbytes, lambda: self._read(piece), early)

    def _read(self, piece: Piece) -> Tensor:
        """Read a tensor on the reading thread, after the previous batch's writes to its file."""
        self._wait_for_writes(self._weights.partition_of(piece.key))
        assert self._reader is not None
        return self._reader.read(piece.key, piece.elements)

    def _wait_for_writes(self, partition: PartitionName) -> None:
        """Wait until the previous batch's writes to a partition's file are done."""
        for future in self._previous_writes.get(partition, ()):
            future.result()
        # Every tensor of the partition asks: waiting once is enough.
        self._previous_writes[partition] = []

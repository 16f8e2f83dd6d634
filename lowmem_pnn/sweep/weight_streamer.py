"""The supply of a sweep: weights and optimizer state that come from the weight files in a known order, and go back behind.

A batch reads what the batch before it has written; a read waits for that write. Within a batch no file is read after it was written.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from torch import Tensor

from lowmem_pnn.device import Device
from lowmem_pnn.engine.prefetch import Prefetcher, Request, WriteBehind
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.memory.pool import MemoryPool
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.stores.tensor_reader import TensorReader
from lowmem_pnn.stores.weights import WeightStore


class WeightStreamer:
    """Reads ahead and writes behind, in bounded memory.

    Args:
        weights: of the run; working files are written in place.
        device: where tensors go to and come from.
        threads: for reading ahead and writing behind.
        stream_bytes: that wait to be taken, and as many that wait to be written.
        state_bytes: of the largest piece of optimizer state that is on the device at one time.
    """

    def __init__(self, weights: WeightStore, device: Device, threads: WorkerThreads, stream_bytes: int, state_bytes: int) -> None:
        self._weights = weights
        self._device = device
        self._threads = threads
        self._stalls = threads.stalls
        self._stream_bytes = stream_bytes
        self._beside_bytes = state_bytes + 2 * stream_bytes
        self._blocks = MemoryPool(0)
        self._behind = WriteBehind(threads.write, stream_bytes)
        # Writes of the batch before, and of this one, by partition.
        self._before: dict[int, list[Future[None]]] = {}
        self._now: dict[int, list[Future[None]]] = {}
        self._reader: TensorReader | None = None
        self._stream: Prefetcher | None = None

    @contextmanager
    def batch(self, keys: Iterable[str]) -> Iterator[None]:
        """A batch, during which tensors can be taken.

        Args:
            keys: names in weight files of all tensors that will be taken, in that order.
        """
        # What is placed elsewhere passes through page-locked memory; where the host is the device, blocks are what is resident.
        with self._weights.tensor_reader(self._device.host_allocator() or self._blocks.empty) as self._reader:
            requests = (Request(self._weights.tensor_bytes(key), lambda key=key: self._read(key)) for key in keys)  # type: ignore[misc]
            self._stream = Prefetcher(requests, self._threads.read, self._stream_bytes)
            try:
                yield
            finally:
                self._stream.close()
                self._stream = None
        self._before, self._now = self._now, {}

    def take(self) -> Tensor:
        """The next tensor, on the host."""
        assert self._stream is not None, "tensors are taken in a batch"
        with self._stalls.waiting("disk"):
            return self._stream.take()

    def expect(self, keys: Iterable[str]) -> None:
        """A partition is about to be loaded: blocks for it, and for what is beside it, are kept for further use.

        Args:
            keys: of its tensors.
        """
        self._blocks.set_limit(sum(map(self._weights.tensor_bytes, keys)) + self._beside_bytes)

    @contextmanager
    def writing(self, partition: int) -> Iterator[tuple[TensorFile, bool]]:
        """A partition's working file, closed when the last write is done; and whether it is new, without any of its values."""
        # A resident weight must not change while it is being written.
        with self._stalls.waiting("disk"):
            self._wait_for(partition)
        is_new = not self._weights.has_working_file(partition)
        if is_new and self._reader is not None:
            # What is still to be read of the partition is in the file before, not in this one, which is empty.
            self._reader.open(partition)
        file = self._weights.writer(partition)
        try:
            yield file, is_new
        finally:
            self._behind.submit(0, file.close)

    def write(self, partition: int, file: TensorFile, key: str, tensor: Tensor) -> None:
        """Have a tensor written.

        Args:
            partition: whose file it is.
            file: from `writing`.
            key: the tensor's name in it.
            tensor: on the device; it must not change before the next batch is over.
        """
        with self._stalls.waiting("copy"):  # for room
            download = self._device.download(tensor.detach())
        with self._stalls.waiting("disk"):  # for room
            future = self._behind.submit(download.nbytes, lambda: file.write_from(key, download.get()))
        self._now.setdefault(partition, []).append(future)

    def settle(self) -> None:
        """Wait until all is written.

        Raises:
            DiskError: it could not be.
        """
        with self._stalls.waiting("disk"):
            self._behind.wait()

    def rest(self) -> None:
        """Let free memory go."""
        self._blocks.clear()

    def close(self) -> None:
        """Give everything up: what waits to be written is written, or not."""
        self._behind.abandon()
        self._before, self._now = {}, {}
        self.rest()

    def _read(self, key: str) -> Tensor:
        """On the reading thread: a tensor's bytes after the batch before this one, once they are written."""
        home = self._weights.partition_of(key)
        assert isinstance(home, int)
        self._wait_for(home)
        assert self._reader is not None
        return self._reader.read(key)

    def _wait_for(self, partition: int) -> None:
        """Until what the batch before has written of a partition is in its file."""
        for future in self._before.get(partition, ()):
            future.result()
        # Asked again for every tensor: once is enough.
        self._before[partition] = []

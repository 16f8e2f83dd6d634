"""Weight streamer of a sweep: prefetches weights and optimizer state in a known order, and writes them behind.

A batch reads the values that the batch before it has written; each read waits for that write. Within a batch no element of a tensor is read
after it was written.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from math import prod

import torch
from torch import Tensor

from lowmem_pnn.device import Device, is_out_of_memory
from lowmem_pnn.device.transfers import Upload
from lowmem_pnn.engine.prefetch import Prefetcher, Request, WriteBehind
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.memory.aligned import HostAllocator
from lowmem_pnn.memory.pool import MemoryPool
from lowmem_pnn.stores.keys import PartitionName
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.stores.tensor_reader import TensorReader
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.sweep.host_tier import HostTier
from lowmem_pnn.sweep.packs import Piece, Place, Write, by_buffer, places_of
from lowmem_pnn.sweep.resident_tensors import ResidentTensors

# Parts of a tensor that wait to be written, at most.
_PARTS_OF_STREAM = 4


class WeightStreamer:
    """Moves weights and optimizer state between the weight files and the computing, in the background and in bounded memory.

    Args:
        weights: weight files of the run; their working files are changed in place.
        device: training device.
        threads: threads that read and write.
        stream_bytes: most bytes of tensors that wait to be taken.
        write_behind: queue of the writes; what waits in it is bounded by as many bytes.
        resident: tensors that stay in memory, neither read nor written but for commits; None where all of them move.
        tier: host memory in which tensors stay from one batch to the next; None where all are in files.
    """

    def __init__(
        self,
        weights: WeightStore,
        device: Device,
        threads: WorkerThreads,
        stream_bytes: int,
        write_behind: WriteBehind,
        resident: ResidentTensors | None = None,
        tier: HostTier | None = None,
    ) -> None:
        assert tier is None or not device.shares_host, "where the host is the device, a tier would be device memory"
        self._weights = weights
        self._tier = tier
        self._device = device
        self._threads = threads
        self._stalls = threads.stalls
        self._stream_bytes = stream_bytes
        # Larger ones, and tensors where nothing is copied, stay by themselves. A half leaves room for a copy the other way.
        self._pack_bytes = 0 if device.shares_host else min(stream_bytes, device.buffer_sizes.transfer_bytes // 2)
        self._packs: deque[list[Piece]] = deque()
        self._taken: deque[Tensor] = deque()
        # The pack after these: on its way to the device, or still on the host where too much is in flight.
        self._ahead: Upload | Tensor | None = None
        self._pool = MemoryPool(0)
        self._write_behind = write_behind
        self._resident = resident or ResidentTensors((), ())
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
            self._prefetcher = Prefetcher(map(self._request, self._packed(pieces)), self._threads.read, self._stream_bytes)
            try:
                yield
            finally:
                self._prefetcher.close()
                self._prefetcher = self._reader = None
                self._packs.clear()
                self._taken.clear()
                ahead, self._ahead = self._ahead, None
                if isinstance(ahead, Upload):
                    ahead.close()
        self._previous_writes, self._present_writes = self._present_writes, {}
        if self._tier is not None:
            self._tier.end_batch()

    def take(self) -> Tensor:
        """Return the next tensor of the batch, on the device."""
        assert self._prefetcher is not None, "tensors are taken in a batch"
        if not self._taken:
            ahead, self._ahead = self._ahead, None
            if isinstance(ahead, Upload):
                (tensor,) = ahead.get()
            elif ahead is not None:
                tensor = self._device.to_device(ahead)
            else:
                with self._stalls.waiting("disk"):
                    host = self._prefetcher.take()
                tensor = self._device.to_device(host)
            pack = self._packs.popleft()
            self._taken.extend([tensor] if len(pack) == 1 else [place.view(tensor) for place in self._places(pack)[0]])
            del tensor
            self._begin_next()
        return self._taken.popleft()

    def _begin_next(self) -> None:
        """Begin the upload of the pack after the one that is being taken, if it has been read and there is room for it.

        So the next layer's state, and the next partition's first layer, go up while this one is computed with.
        """
        assert self._prefetcher is not None
        if self._device.shares_host or not self._packs or sum(map(self._bytes_of, self._packs[0])) > self._pack_bytes:
            return
        if (host := self._prefetcher.take_ready()) is None:
            return
        try:
            self._ahead = self._device.upload([host]) or host
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._ahead = host

    def reserve_pool_for(self, keys: Iterable[str]) -> None:
        """Set the limit of the memory pool for a partition that is about to be loaded, and for the streams beside it.

        No more: a layer's optimizer state is let go before the layer before it goes back, whose kernels need the memory.

        Args:
            keys: names in weight files of the partition's tensors.
        """
        names = list(keys)
        needed = sum(self._bytes_of(Piece(key)) for key in names) - self._resident.bytes_of(names)
        self._pool.set_limit(needed + 2 * self._stream_bytes + self._resident.nbytes)

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
        if not self._resident.put(key, first, tensor.detach()):
            self._write_whole_or_in_parts(partition, file, key, tensor, first)

    def _write_whole_or_in_parts(self, partition: int, file: TensorFile, key: str, tensor: Tensor, first: int | None) -> None:
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

    def write_all(self, partition: int, file: TensorFile, writes: Sequence[Write], *, copy: bool = False) -> None:
        """Begin to write tensors; those that lie in one buffer come down in one copy.

        Args:
            partition: number of the partition whose file is open.
            file: file that `writing` opened.
            writes: what is to be written; it must not change before the next batch is over.
            copy: whether it may change, so that copies of it are written.
        """
        if self._device.shares_host:
            for one in writes:
                self.write(partition, file, one.key, one.tensor.clone() if copy else one.tensor, one.first)
            return
        for span, places in by_buffer([one.tensor.detach() for one in writes]):
            if len(places) == 1:
                only = writes[places[0][0]]
                self.write(partition, file, only.key, only.tensor.clone() if copy else only.tensor, only.first)
                continue
            self._write_span(
                partition, file, span.clone() if copy else span, [(writes[number], place) for number, place in places]
            )

    def _write_span(self, partition: int, file: TensorFile, span: Tensor, writes: Sequence[tuple[Write, Place]]) -> None:
        with self._stalls.waiting("copy"):  # for room
            download = self._device.download(span)

        def write() -> None:
            host = download.get()
            for one, place in writes:
                self._keep_or_write(partition, file, Write(one.key, place.view(host), one.first))

        self._submit(partition, download.nbytes, write, [one.key for one, _ in writes])

    def finish_writes_in_parts(self) -> None:
        """Wait until tensors that are larger than the stream are written, before their memory is to be free."""
        with self._stalls.waiting("disk"):
            wait(self._in_parts)
        self._in_parts.clear()

    def _write(self, partition: int, file: TensorFile, key: str, tensor: Tensor, first: int | None) -> None:
        with self._stalls.waiting("copy"):  # for room
            download = self._device.download(tensor.detach())

        self._submit(
            partition, download.nbytes, lambda: self._keep_or_write(partition, file, Write(key, download.get(), first)), [key]
        )

    def _keep_or_write(self, partition: int, file: TensorFile, one: Write) -> None:
        """Bring a host tensor to its place, on the writing thread: into the tier, if there is room, else into its file."""
        if self._tier is not None and self._tier.put(partition, one.key, one.tensor, one.first):
            return
        if one.first is None:
            file.write_from(one.key, one.tensor)
        else:
            file.write_elements(one.key, one.tensor, one.first)

    def _submit(self, partition: int, nbytes: int, write_fn: Callable[[], None], keys: Iterable[str]) -> None:
        for key in keys:
            if self._tier is not None:
                self._tier.expect(key)
        with self._stalls.waiting("disk"):  # for room
            future = self._write_behind.submit(nbytes, write_fn)
        self._present_writes.setdefault(partition, []).append(future)

    def finish_writes(self) -> None:
        """Wait until everything is written into the files: what stays in memory, here or in the tier, too.

        Raises:
            DiskError: a write failed.
        """
        changed: dict[int, list[tuple[str, int | None, Tensor]]] = {}
        for key, first, tensor in self._resident.changed():
            partition = self._weights.partition_of(key)
            assert partition != "rest", "what is stepped is in its partition's file"
            changed.setdefault(partition, []).append((key, first, tensor))
        for partition, tensors in changed.items():
            # Not a new file: the batches have written there what does not stay.
            file = self._weights.writer(partition)
            try:
                for key, first, tensor in tensors:
                    self._write_whole_or_in_parts(partition, file, key, tensor, first)
            finally:
                self._write_behind.submit_close(file.close)
        self._resident.mark_written()
        with self._stalls.waiting("disk"):
            self._write_behind.wait()
        if self._tier is None:
            return
        for partition, unsaved in self._tier.unsaved():
            with self.writing(partition) as (file, _), self._stalls.waiting("disk"):
                for key, tensor in unsaved:
                    self._write_behind.submit(tensor.nbytes, partial(file.write_from, key, tensor))
        with self._stalls.waiting("disk"):
            self._write_behind.wait()

    def free_memory(self) -> None:
        """Free the memory of resident tensors, which `finish_writes` has written, and the unused memory of the pool."""
        assert not self._resident.has_changes, "resident tensors are written before their memory is freed"
        self._resident.clear()
        self._pool.clear()

    def close(self) -> None:
        """Wait for the writes under way, whatever comes of them, and free all memory."""
        self._write_behind.abandon()
        self._previous_writes, self._present_writes = {}, {}
        self._in_parts.clear()
        if self._tier is not None:
            self._tier.clear()
        self._resident.clear()
        self._pool.clear()

    def _packed(self, pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
        """Yield the pieces in packs, in their order."""
        pack: list[Piece] = []
        size = 0
        for piece in pieces:
            nbytes = self._bytes_of(piece)
            if pack and (
                not self._pack_bytes or piece.pack is None or piece.pack != pack[-1].pack or size + nbytes > self._pack_bytes
            ):
                yield pack
                pack, size = [], 0
            pack.append(piece)
            size += nbytes
        if pack:
            yield pack

    def _places(self, pack: Sequence[Piece]) -> tuple[list[Place], int]:
        return places_of(self._weights.tensor_layout(piece.key, piece.elements) for piece in pack)

    def _bytes_of(self, piece: Piece) -> int:
        dtype, shape = self._weights.tensor_layout(piece.key, piece.elements)
        return dtype.itemsize * prod(shape)

    def _request(self, pack: list[Piece]) -> Request:
        self._packs.append(pack)
        if len(pack) == 1 and (resident := self._resident.find(pack[0].key, pack[0].elements)) is not None:
            return Request(0, lambda: resident)
        nbytes = sum(map(self._bytes_of, pack))
        # On the host a tensor that is larger than the stream would be in memory twice: it is read into its place, when that is free.
        early = nbytes <= self._stream_bytes or not self._device.shares_host
        return Request(nbytes, lambda: self._read(pack), early)

    def _read(self, pack: Sequence[Piece]) -> Tensor:
        """Read a pack on the reading thread, after the previous batch's writes to its files."""
        for piece in pack:
            self._wait_for_writes(self._weights.partition_of(piece.key))
        if len(pack) == 1:
            tensor = self._read_piece(pack[0], self._device.host_allocator())
            self._resident.keep(pack[0].key, pack[0].elements, tensor)
            return tensor
        allocate = self._device.host_allocator()
        assert allocate is not None, "packs are for another device"
        places, size = self._places(pack)
        buffer = allocate((size,), torch.uint8)
        for piece, place in zip(pack, places, strict=True):
            view = place.view(buffer)
            self._read_piece(piece, lambda shape, dtype, view=view: view)  # type: ignore[misc]
        return buffer

    def _read_piece(self, piece: Piece, allocate: HostAllocator | None) -> Tensor:
        """Read a piece from the tier, or from its file."""
        assert self._reader is not None
        if self._tier is None or not self._tier.has(piece.key):
            return self._reader.read(piece.key, piece.elements, allocate)
        dtype, shape = self._weights.tensor_layout(piece.key, piece.elements)
        assert allocate is not None, "a tier is for another device"
        tensor = allocate(shape, dtype)
        self._tier.read(piece.key, piece.elements, tensor)
        return tensor

    def _wait_for_writes(self, partition: PartitionName) -> None:
        """Wait until the previous batch's writes to a partition's file are done."""
        for future in self._previous_writes.get(partition, ()):
            future.result()
        # Every tensor of the partition asks: waiting once is enough.
        self._previous_writes[partition] = []

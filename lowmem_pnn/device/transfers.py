"""Copies between host and device beside the computing, through page-locked host memory, with bounded memory on both sides.

    host tensor --> [ page-locked piece ] --upload stream--> device tensor --(computing waits for the copy)--> computing
    computing --(the copy waits for computing)--> device tensor --download stream--> [ page-locked piece ] --(a thread waits)--> disk

Device tensors are allocated and freed on the stream that computes, and events order the streams on either side of that: a copy begins
after all computations that were asked for by then, so that it finds the memory free; and before a tensor that was copied is used or
freed, computing (or the host) waits for the copy. `Tensor.record_stream` would do the same without the second wait, but it leaves the
moment at which memory can be used again to chance, and a budget cannot be kept by chance.

Copies in flight (uploads ahead of their use, downloads that are not complete) hold device memory beside the computing: together no more
than a limit, which plans keep free. A tensor larger than the limit comes down at once, while the host waits; one for which the page-locked
memory has no room goes through it in pieces, either way.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lowmem_pnn.memory.aligned import PAGE_BYTES, aligned_empty
from lowmem_pnn.memory.pinned import PinnedSlab

_T = TypeVar("_T")

# Pieces of a tensor that is larger than the slab, in the slab at one time.
_PIECES = 4


def in_flight_bytes_of(budget_bytes: int) -> int:
    """Return the limit of the device memory of copies in flight: a thirty-second of the budget."""
    return budget_bytes // 32


class CopyEvent(Protocol):
    """The end of a copy in its stream."""

    def wait(self) -> None:
        """Have the host wait for the copy; on any thread."""

    def block_computing(self) -> None:
        """Have all computations that are asked for from now on wait for the copy; on the thread that computes."""

    def is_complete(self) -> bool:
        """Decide whether the copy is done, without waiting."""


class CopyEngine(Protocol):
    """The copies that `Transfers` asks of the machine; a simulated engine does them without a GPU.

    Each direction has a stream of its own, in which copies are done in order.
    """

    def upload(self, host: Tensor, target: Tensor) -> CopyEvent:
        """Begin to copy to the device, after all computations that were asked for so far.

        Args:
            host: page-locked tensor; it stays there, unchanged, until the copy is complete.
            target: device tensor of the same shape, strides and type.
        """

    def download(self, source: Tensor, host: Tensor) -> CopyEvent:
        """Begin to copy to the host, after all computations that were asked for so far.

        Args:
            source: device tensor; it stays there, unchanged, until the copy is complete.
            host: page-locked tensor of the same shape, strides and type.
        """


class Upload:
    """Tensors on their way to the device, for `get` or `close`."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self.tensors: list[Tensor] = []
        # The end of the last of their copies.
        self.event: CopyEvent | None = None
        self._on_end: Callable[[], None] | None = on_end

    def add(self, tensor: Tensor) -> None:
        """Add a device tensor, whose copy is about to begin."""
        self.tensors.append(tensor)

    def get(self) -> tuple[Tensor, ...]:
        """Return the tensors on the device, once: computations from now on wait for the copies, the host does not."""
        tensors = tuple(self.tensors)
        self.close()
        return tensors

    def close(self) -> None:
        """Drop the tensors, unless `get` has returned them. Computations after the copies may use their memory."""
        if self.event is not None:
            self.event.block_computing()
            self.event = None
        self.tensors.clear()
        if self._on_end is not None:
            self._on_end()
            self._on_end = None


class Download:
    """A tensor on its way to the host; the host memory is given back when the download and the tensor that `get` returned are gone."""

    def __init__(self, host: Tensor, source: Tensor | None = None, event: CopyEvent | None = None) -> None:
        self._host = host
        self._source = source
        self._event = event
        self._on_end: Callable[[], None] | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return self._host.nbytes

    def is_complete(self) -> bool:
        """Decide whether `get` would return without waiting."""
        event = self._event  # another thread may set it to None meanwhile
        return event is None or event.is_complete()

    def block_computing(self) -> None:
        """Have all computations that are asked for from now on wait for the copy: they may change the device tensor; the host does not wait."""
        event = self._event  # another thread may set it to None meanwhile
        if event is not None:
            event.block_computing()

    def call_at_end(self, on_end: Callable[[], None]) -> None:
        """Have a function called, once, when the device tensor is let go."""
        self._on_end = on_end

    def get(self) -> Tensor:
        """Return the tensor on the host, after waiting for the copy; on any thread, any number of times."""
        with self._lock:
            if self._event is not None:
                self._event.wait()
                self._event = self._source = None
                on_end, self._on_end = self._on_end, None  # it refers to this download: a cycle would keep the memory
                if on_end is not None:
                    on_end()
        return self._host


class Transfers:
    """Copies between the host and one device.

    Args:
        engine: engine that does the copies.
        device: device of the uploaded tensors.
        limit_bytes: device memory of all copies in flight together.
        slab: page-locked host memory.
    """

    def __init__(self, engine: CopyEngine, device: torch.device, limit_bytes: int, slab: PinnedSlab) -> None:
        self._engine = engine
        self._device = device
        self._limit_bytes = limit_bytes
        self.slab = slab
        # Copies that are not known to be complete; an upload's with its page-locked tensor.
        self._uploads: deque[tuple[CopyEvent, Tensor]] = deque()
        self._downloads: deque[Download] = deque()
        self._in_flight_bytes = 0
        self._lock = threading.Lock()

    @property
    def in_flight_bytes(self) -> int:
        """Device memory of the copies in flight, now."""
        return self._in_flight_bytes

    def to_device(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Copy host tensors to the device, for use now: computations from now on wait for the copies, the host does not.

        Args:
            tensors: host tensors; nobody may write to those in this slab any more, others may be written to at once.
        """
        return self._begin_upload(tensors).get()

    def upload(self, tensors: Sequence[Tensor]) -> Upload | None:
        """Begin to copy host tensors to the device, for later use.

        Args:
            tensors: host tensors, as for `to_device`.

        Returns:
            The upload; None where it would exceed the limit.
        """
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if not self._claim(nbytes):
            return None
        return self._begin_upload(tensors, lambda: self._return(nbytes))

    def download(self, tensor: Tensor) -> Download:
        """Begin to copy a device tensor to the host. The host waits only where there is no room for a copy in flight.

        Args:
            tensor: device tensor; it must not change before the copy is complete.
        """
        source = tensor.detach()
        if source.stride() != torch.empty_like(source, device="meta").stride():
            source = source.clone()  # dense bytes: the copy would allocate its temporary on the download stream
        while self._first_download_is_complete():
            self._finish_first_download()
        held = source.untyped_storage().nbytes()  # a view holds all of it
        while not self._claim(held):
            if not self._finish_first_download():
                return Download(self._copy_to_host(source))  # larger than the limit
        host = self._lend_like(source)
        if host is None:
            self._return(held)
            return Download(self._copy_to_host(source))
        download = Download(host, source, self._engine.download(source, host))
        download.call_at_end(lambda: self._forget(download, held))
        with self._lock:
            self._downloads.append(download)
        return download

    def finish(self) -> None:
        """Wait until no copy is in flight."""
        while self._finish_first_upload() or self._finish_first_download():
            pass

    def close(self) -> None:
        """Wait until no copy is in flight, and let the page-locked memory go."""
        self.finish()
        self.slab.close()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Make a host tensor to be filled and uploaded, page-locked where there is room, so without another copy; on any thread.

        Prefetched tensors get no more than half of the slab, so that copies that cannot wait find room.
        """
        nbytes = prod(shape) * dtype.itemsize
        self._give_back()
        piece = self.slab.lend(shape, dtype) if self.slab.lent_bytes + nbytes <= self.slab.size // 2 else None
        return aligned_empty(shape, dtype) if piece is None else piece

    def _begin_upload(self, tensors: Sequence[Tensor], on_end: Callable[[], None] = lambda: None) -> Upload:
        upload = Upload(on_end)
        try:
            for tensor in tensors:
                # With the strides that `Tensor.to` would give it: kernels round differently for another layout.
                upload.add(torch.empty_like(tensor, device=self._device))
            for tensor, target in zip(tensors, upload.tensors, strict=True):
                host = self._in_page_locked_memory(tensor, target)
                if host is not None:
                    upload.event = self._upload_from(host, target)
                elif tensor.is_contiguous() and target.is_contiguous():
                    upload.event = self._upload_in_pieces(tensor, target) or upload.event
                else:
                    target.copy_(tensor)
        except BaseException:
            upload.close()  # the exception's traceback holds this frame
            raise
        return upload

    def _upload_from(self, host: Tensor, target: Tensor) -> CopyEvent:
        event = self._engine.upload(host, target)
        self._uploads.append((event, host))
        return event

    def _upload_in_pieces(self, tensor: Tensor, target: Tensor) -> CopyEvent | None:
        """Copy a tensor that the slab has no room for piece by piece, and return the last of the copies."""
        event = None
        for source, goal in zip(self._in_pieces(tensor), self._in_pieces(target), strict=True):
            host = self._lend_like(goal)
            if host is None:
                goal.copy_(source)
            else:
                host.copy_(source)
                event = self._upload_from(host, goal)
        return event

    def _in_pieces(self, tensor: Tensor) -> Sequence[Tensor]:
        """Cut a contiguous tensor into pieces of a quarter of the slab, so that one is filled while others are copied."""
        flat = tensor.detach().view(-1)
        size = self.slab.size // _PIECES
        return flat.split(size // flat.element_size()) if size >= PAGE_BYTES else (flat,)

    def _in_page_locked_memory(self, tensor: Tensor, target: Tensor) -> Tensor | None:
        """Return a dense page-locked copy of a host tensor with the strides of its target; None if there is no room, now or ever."""
        if self.slab.owns(tensor) and tensor.stride() == target.stride():
            return tensor
        host = self._lend_like(target)
        if host is not None:
            host.copy_(tensor)
        return host

    def _lend_like(self, tensor: Tensor) -> Tensor | None:
        """Lend page-locked memory for the copy of a tensor; where there is none, wait for earlier uploads, which soon complete."""
        like = torch.empty_like(tensor, device="meta")
        self._give_back()
        while (piece := self.slab.lend(tuple(like.shape), like.dtype, like.stride())) is None:
            if not self._finish_first_upload():
                return None
        return piece

    def _give_back(self) -> None:
        """Give the page-locked memory of uploads that are complete back to the slab; on any thread."""
        with self._lock:
            while self._uploads and self._uploads[0][0].is_complete():
                self._uploads.popleft()

    def _copy_to_host(self, source: Tensor) -> Tensor:
        """Copy a device tensor while the host waits: through the slab, as far as it has room."""
        result = torch.empty_like(source, device="cpu")
        if not source.is_contiguous():
            return result.copy_(source)
        for part, goal in zip(self._in_pieces(source), self._in_pieces(result), strict=True):
            host = self._lend_like(part)
            if host is None:
                goal.copy_(part)
            else:
                self._engine.download(part, host).wait()
                goal.copy_(host)
        return result

    def _claim(self, nbytes: int) -> bool:
        """Count device memory as in flight, if that stays within the limit."""
        with self._lock:
            if self._in_flight_bytes + nbytes > self._limit_bytes:
                return False
            self._in_flight_bytes += nbytes
            return True

    def _return(self, nbytes: int) -> None:
        with self._lock:
            self._in_flight_bytes -= nbytes

    def _forget(self, download: Download, held: int) -> None:
        with self._lock:
            self._in_flight_bytes -= held
            self._downloads.remove(download)

    def _first_download_is_complete(self) -> bool:
        with self._lock:
            return bool(self._downloads) and self._downloads[0].is_complete()

    def _finish_first_upload(self) -> bool:
        with self._lock:
            if not self._uploads:
                return False
            event, host = self._uploads.popleft()
        event.wait()
        del host  # not before: it is copied from
        return True

    def _finish_first_download(self) -> bool:
        with self._lock:
            if not self._downloads:
                return False
            download = self._downloads[0]
        download.get()
        return True


def overlapped_downloads(items: Iterable[tuple[_T, Download]]) -> Iterator[tuple[_T, Tensor]]:
    """Yield downloaded tensors in order; each is waited for after the next download has begun.

    Args:
        items: a key and a download each; a download begins when its item is asked for.

    Yields:
        The key and the tensor on the host.
    """
    waiting: tuple[_T, Download] | None = None
    for item in items:
        if waiting is not None:
            yield waiting[0], waiting[1].get()
        waiting = item
        del item
    if waiting is not None:
        yield waiting[0], waiting[1].get()

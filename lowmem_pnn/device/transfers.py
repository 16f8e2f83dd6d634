"""Transfers: copies between host and device that go on beside the computing, in bounded memory on both sides.

    host tensor --> [ page-locked piece ] --up stream--> device tensor --(computing waits for the copy)--> computing
    computing --(the copy waits for computing)--> device tensor --down stream--> [ page-locked piece ] --(a thread waits)--> disk

Device tensors are allocated and freed on the stream that computes, and events order the streams on either side of that: a copy begins
after all that computing was asked for by then, so that it finds the memory free; and before a tensor that was copied is used or freed,
computing (or the host) waits for the copy. `Tensor.record_stream` would do the same without the second wait, but it leaves the moment at
which memory can be used again to chance, and a budget cannot be kept by chance.

What goes ahead or behind holds device memory beside what computes: together no more than a window, which plans keep free. What is larger
than the window is copied at its turn.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lowmem_pnn.memory.pinned import PinnedSlab
from lowmem_pnn.stores.tensor_file import aligned_empty

_T = TypeVar("_T")


def window_of(budget_bytes: int) -> int:
    """Device memory for what was copied ahead of its use, or is being copied down: a thirty-second of a budget."""
    return budget_bytes // 32


class Mark(Protocol):
    """The place in a stream where a copy ends."""

    def wait(self) -> None:
        """Have the host wait until it is reached; on any thread."""

    def hold_computing(self) -> None:
        """Have all computing that is asked for from now on wait for it; on the thread that computes."""

    def is_past(self) -> bool:
        """Whether it is reached."""


class CopyEngine(Protocol):
    """The few things that copies ask of the machine; a simulated one does them without a GPU.

    Each direction has a stream of its own, in which copies are done in order.
    """

    def up(self, host: Tensor, target: Tensor) -> Mark:
        """Begin to copy, after all that computing was asked for so far.

        Args:
            host: page-locked; it is there, unchanged, until the mark is past.
            target: on the device, of the same shape, strides and type.
        """

    def down(self, source: Tensor, host: Tensor) -> Mark:
        """Begin to copy, after all that computing was asked for so far.

        Args:
            source: on the device; it is there, unchanged, until the mark is past.
            host: page-locked, of the same shape, strides and type.
        """


class Upload:
    """Tensors on their way to the device, to be taken or closed."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self.tensors: list[Tensor] = []
        # Of the last of their copies.
        self.mark: Mark | None = None
        self._on_end: Callable[[], None] | None = on_end

    def add(self, tensor: Tensor) -> None:
        """One more tensor on the device, whose copy is about to begin."""
        self.tensors.append(tensor)

    def get(self) -> tuple[Tensor, ...]:
        """The tensors on the device, once: what is computed from now on waits for their bytes, the host does not."""
        tensors = tuple(self.tensors)
        self.close()
        return tensors

    def close(self) -> None:
        """Give up what was not taken. Its memory is free for what is computed after the copy."""
        if self.mark is not None:
            self.mark.hold_computing()
            self.mark = None
        self.tensors.clear()
        if self._on_end is not None:
            self._on_end()
            self._on_end = None


class Download:
    """A tensor on its way to the host; the host's memory is given back when this and what `get` gave are gone."""

    def __init__(self, host: Tensor, source: Tensor | None = None, mark: Mark | None = None) -> None:
        self._host = host
        self._source = source
        self._mark = mark
        self._on_end: Callable[[], None] | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of host memory."""
        return self._host.nbytes

    def is_past(self) -> bool:
        """Whether `get` would not wait."""
        mark = self._mark  # another thread may be done with it meanwhile
        return mark is None or mark.is_past()

    def when_over(self, on_end: Callable[[], None]) -> None:
        """Have something done, once, when the device's tensor is let go."""
        self._on_end = on_end

    def get(self) -> Tensor:
        """The tensor on the host, after waiting for it; on any thread, any number of times."""
        with self._lock:
            if self._mark is not None:
                self._mark.wait()
                self._mark = self._source = None
                on_end, self._on_end = self._on_end, None  # which knows this: a cycle would keep the memory
                if on_end is not None:
                    on_end()
        return self._host


class Transfers:
    """Copies of one device.

    Args:
        engine: does them.
        device: where tensors go to.
        window_bytes: on the device, of uploads that were not taken and downloads that are under way, together.
        slab: page-locked host memory.
    """

    def __init__(self, engine: CopyEngine, device: torch.device, window_bytes: int, slab: PinnedSlab) -> None:
        self._engine = engine
        self._device = device
        self._window_bytes = window_bytes
        self.slab = slab
        # Page-locked pieces whose copies are not known to be over.
        self._going_up: deque[tuple[Mark, Tensor]] = deque()
        self._going_down: deque[Download] = deque()
        self._waiting_bytes = 0
        self._lock = threading.Lock()

    @property
    def waiting_bytes(self) -> int:
        """Device memory of what is ahead or behind, now."""
        return self._waiting_bytes

    def to_device(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Host tensors on the device, for use now: what is computed from now on waits for them, the host does not.

        Args:
            tensors: those in page-locked memory of ours must not be written to any more; others may at once.
        """
        return self._begin(tensors).get()

    def upload(self, tensors: Sequence[Tensor]) -> Upload | None:
        """Begin to bring tensors up, for later use; None where the window has no room for them.

        Args:
            tensors: as for `place`.
        """
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if not self._enter(nbytes):
            return None
        return self._begin(tensors, lambda: self._leave(nbytes))

    def download(self, tensor: Tensor) -> Download:
        """Begin to bring a tensor down. The host waits only where there is no room for it to go on by itself.

        Args:
            tensor: on the device; it must not change before the copy is over.
        """
        source = tensor.detach()
        if source.stride() != torch.empty_like(source, device="meta").stride():
            source = source.clone()  # bytes in one piece: what a copy needs beside them would come from the stream's own memory
        while self._first_down_is_past():
            self._finish_first_down()
        held = source.untyped_storage().nbytes()  # a view holds all of it
        while not self._enter(held):
            if not self._finish_first_down():
                return Download(self._on_host(source))  # larger than the window
        host = self._lend_like(source)
        if host is None:
            self._leave(held)
            return Download(self._on_host(source))
        download = Download(host, source, self._engine.down(source, host))
        download.when_over(lambda: self._forget(download, held))
        with self._lock:
            self._going_down.append(download)
        return download

    def settle(self) -> None:
        """Wait until nothing is under way."""
        while self._finish_first_up() or self._finish_first_down():
            pass

    def close(self) -> None:
        """Wait until nothing is under way, and let the page-locked memory go."""
        self.settle()
        self.slab.close()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A host tensor that can be filled, and brought up without another copy on the host where it is page-locked; on any thread.

        What is read ahead gets no more than half of the slab, so that copies that cannot wait find room.
        """
        nbytes = prod(shape) * dtype.itemsize
        piece = self.slab.lend(shape, dtype) if self.slab.lent_bytes + nbytes <= self.slab.size // 2 else None
        return aligned_empty(shape, dtype) if piece is None else piece

    def _begin(self, tensors: Sequence[Tensor], on_end: Callable[[], None] = lambda: None) -> Upload:
        upload = Upload(on_end)
        try:
            for tensor in tensors:
                # With the strides that `Tensor.to` would give it: kernels round differently for another layout.
                upload.add(torch.empty_like(tensor, device=self._device))
            for tensor, target in zip(tensors, upload.tensors, strict=True):
                host = self._staged(tensor, target)
                if host is None:
                    target.copy_(tensor)
                else:
                    upload.mark = mark = self._engine.up(host, target)
                    self._going_up.append((mark, host))
        except BaseException:
            upload.close()  # the exception's traceback holds this frame
            raise
        return upload

    def _staged(self, tensor: Tensor, target: Tensor) -> Tensor | None:
        """A host tensor in page-locked memory, dense, with the strides of its target; None where there is no room, now or ever."""
        if self.slab.owns(tensor) and tensor.stride() == target.stride():
            return tensor
        host = self._lend_like(target)
        if host is not None:
            host.copy_(tensor)
        return host

    def _lend_like(self, tensor: Tensor) -> Tensor | None:
        """A piece for a tensor's copy. Rather than going without, it is waited for: the copies of before will soon be over."""
        like = torch.empty_like(tensor, device="meta")
        while self._going_up and self._going_up[0][0].is_past():
            self._going_up.popleft()
        while (piece := self.slab.lend(tuple(like.shape), like.dtype, like.stride())) is None:
            if not self._finish_first_up():
                return None
        return piece

    @staticmethod
    def _on_host(source: Tensor) -> Tensor:
        return torch.empty_like(source, device="cpu").copy_(source)

    def _enter(self, nbytes: int) -> bool:
        """Take room in the window, if there is some."""
        with self._lock:
            if self._waiting_bytes + nbytes > self._window_bytes:
                return False
            self._waiting_bytes += nbytes
            return True

    def _leave(self, nbytes: int) -> None:
        with self._lock:
            self._waiting_bytes -= nbytes

    def _forget(self, download: Download, held: int) -> None:
        with self._lock:
            self._waiting_bytes -= held
            self._going_down.remove(download)

    def _first_down_is_past(self) -> bool:
        with self._lock:
            return bool(self._going_down) and self._going_down[0].is_past()

    def _finish_first_up(self) -> bool:
        if not self._going_up:
            return False
        mark, _ = self._going_up.popleft()
        mark.wait()
        return True

    def _finish_first_down(self) -> bool:
        with self._lock:
            if not self._going_down:
                return False
            download = self._going_down[0]
        download.get()
        return True


def one_behind(items: Iterable[tuple[_T, Download]]) -> Iterator[tuple[_T, Tensor]]:
    """Tensors on the host, in order, each waited for after the next one is on its way.

    Args:
        items: downloads, begun when they are asked for, with something to know them by.
    """
    waiting: tuple[_T, Download] | None = None
    for item in items:
        if waiting is not None:
            yield waiting[0], waiting[1].get()
        waiting = item
        del item
    if waiting is not None:
        yield waiting[0], waiting[1].get()

"""Kept products: outputs of the first forward that the forward before a backward takes back instead of computing them again.

    first forward    x --[norm]--[matrix product]--[gelu]--[matrix product]-->      products go to a file as they are computed
    second forward   x --[norm]--[    taken     ]--[gelu]--[    taken     ]-->      with a graph, for the backward

What is cheap for its size (norms, activations, additions) is computed again: it would take longer to move. The products are taken
below autograd, which records them as always, with the tensors that it saves: every gradient is the same, bit for bit.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn.device import Device
from lowmem_pnn.dispatch_mode import DispatchMode
from lowmem_pnn.engine.prefetch import Prefetcher, Request, WriteBehind
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.profiling.costs import Product
from lowmem_pnn.profiling.products import cost_of, is_product
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.scratch import Scratch
from lowmem_pnn.sweep.recompute import called_by

Finish = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Function that is given what a layer returned, and returns it when it may be changed."""


class KeptProducts:
    """The kept products of one batch. They are written, and read ahead, while the computing goes on.

    What is read ahead are products of the micro-batch that is on its way: they would be in memory a moment later.

    Args:
        device: training device, open.
        folder: folder in which the file is made; it has no name there.
        counter: counter of the bytes written to disk and read.
        threads: threads that read and write.
        write_behind: queue of the writes, which bounds the bytes that wait.
        window_bytes: most bytes that are read ahead; a product that is larger is written and read at once.
        layers: numbers of the layers whose products are kept.
        is_kept: decides which of their products are.
    """

    def __init__(
        self,
        device: Device,
        folder: Path,
        counter: IoCounter,
        threads: WorkerThreads,
        write_behind: WriteBehind,
        window_bytes: int,
        layers: Sequence[int],
        is_kept: Callable[[Product], bool],
    ) -> None:
        self._device, self._threads, self._write_behind, self._window_bytes = device, threads, write_behind, window_bytes
        # In the file alone: its pages are in the system's cache, where there is room.
        self._scratch = Scratch(folder, 0, counter)
        self._layers, self._is_kept = frozenset(layers), is_kept
        # The operations whose outputs are kept, in their order; None for a product that is computed again.
        self._operations: dict[tuple[int, int], list[_Kept | None]] = {}
        self._prefetcher: Prefetcher | None = None

    @contextmanager
    def keeping(self, layer: int, number: int, unneeded: Sequence[nn.Module] = ()) -> Iterator[Finish]:
        """Keep the products of a layer's first forward.

        Args:
            layer: number of the layer.
            number: number of the micro-batch.
            unneeded: modules whose products no gradient depends on; they are not kept, and are not computed a second time.

        Yields:
            A function that what the layer returns has to pass through.
        """
        if layer not in self._layers:
            yield _as_it_is
            return
        operations = self._operations[layer, number] = []
        writes = _Writes()

        def put(tensors: Sequence[Tensor | None]) -> None:
            for part, tensor in enumerate(tensors):
                if tensor is not None:
                    self._put((layer, number, len(operations), part), tensor, writes)

        mode = _Keeping(self._is_kept, operations, put, writes)
        with mode, called_by(unneeded, mode.call_paused):
            yield writes.finish

    @contextmanager
    def reading(self, layers: Iterable[int], number: int) -> Iterator[None]:
        """Read the products of a micro-batch ahead, inside the context.

        Args:
            layers: numbers of the layers that run a second time, in their order.
            number: number of the micro-batch.
        """
        requests = (
            Request(nbytes, lambda key=(layer, number, place, part): self._read(key), nbytes <= self._window_bytes)  # type: ignore[misc]
            for layer in layers
            for place, kept in enumerate(self._operations.get((layer, number), ()))
            if kept is not None
            for part, nbytes in enumerate(kept.sizes)
            if nbytes is not None
        )
        self._prefetcher = Prefetcher(requests, self._threads.read, self._window_bytes)
        self._prefetcher.start()
        try:
            yield
        finally:
            self._prefetcher.close()
            self._prefetcher = None

    @contextmanager
    def taking(self, layer: int, number: int) -> Iterator[None]:
        """Have a layer's second forward take the products that the first one kept, and forget them; without any it computes them.

        Args:
            layer: number of the layer.
            number: number of the micro-batch.
        """
        operations = self._operations.get((layer, number))
        if operations is None:
            yield
            return
        with _Taking(operations, lambda place, part: self._take((layer, number, place, part))):
            yield
        del self._operations[layer, number]

    def clear(self) -> None:
        """Forget everything, at the end of a batch; the file stays for the next one."""
        self._operations.clear()
        self._scratch.clear()

    def close(self) -> None:
        """Forget everything, and give the file's room back; no write is under way."""
        self._operations.clear()
        self._scratch.close()

    def _put(self, key: tuple[int, ...], tensor: Tensor, writes: "_Writes") -> None:
        if tensor.nbytes > self._window_bytes:
            self._scratch.put(key, [self._device.to_host(tensor)])
            return

        def submit(nbytes: int, write: Callable[[], None]) -> "Future[None]":
            with self._threads.stalls.waiting("disk"):  # for room
                future = self._write_behind.submit(nbytes, write)
            if self._device.shares_host:
                writes.add(tensor, future.result)
            return future

        if self._device.shares_host:
            self._scratch.put(key, [tensor], submit)
            return
        with self._threads.stalls.waiting("copy"):  # for room
            download = self._device.download(tensor)
        # Not itself: its page-locked memory would be lent until the layer is through.
        copy = weakref.ref(download)
        writes.add(tensor, lambda: None if (own := copy()) is None else own.block_computing())
        self._scratch.put_later(key, torch.empty_like(tensor, device="meta"), download.get, submit)

    def _read(self, key: tuple[int, ...]) -> Tensor:
        (tensor,) = self._scratch.get(key)
        assert tensor is not None, "a product was put"
        return tensor

    def _take(self, key: tuple[int, ...]) -> Tensor:
        assert self._prefetcher is not None, "products are taken while they are being read"
        with self._threads.stalls.waiting("disk"):
            tensor = self._prefetcher.take()
        self._scratch.drop(key)
        return self._device.to_device(tensor)


def _as_it_is(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs


@dataclass(frozen=True)
class _Kept:
    """An operation whose outputs are kept.

    Args:
        func: overload of the operation.
        others: its outputs that are no tensors (sizes, of which a kernel tells), as they are; None in the place of each tensor.
        sizes: bytes of its outputs; None in the place of what is no tensor.
        is_one: whether it returned a tensor, not several.
    """

    func: Any
    others: tuple[Any, ...]
    sizes: tuple[int | None, ...]
    is_one: bool


class _Writes:
    """The writes, or copies to the host, under way of a layer's products, whose memory must not change until they are done."""

    def __init__(self) -> None:
        self._waits: dict[int, Callable[[], object]] = {}

    def add(self, tensor: Tensor, wait: Callable[[], object]) -> None:
        """Remember the function that waits until a tensor may change."""
        self._waits[_memory_of(tensor)] = wait

    def wait_for(self, tensor: Tensor) -> None:
        """Wait until the memory that a tensor shows may change."""
        if (wait := self._waits.pop(_memory_of(tensor), None)) is not None:
            wait()

    def finish(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what a layer returned when its memory may change."""
        for tensor in outputs:
            self.wait_for(tensor)
        return outputs


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Keeping(DispatchMode):
    """Keeps the outputs of products. It works below autograd."""

    def __init__(
        self,
        is_kept: Callable[[Product], bool],
        operations: list[_Kept | None],
        put: Callable[[Sequence[Tensor | None]], None],
        writes: _Writes,
    ) -> None:
        super().__init__()
        self._is_paused = False
        self._is_kept, self._operations, self._put, self._writes = is_kept, operations, put, writes

    def call_paused(self, forward: Callable[..., Any], *tensors: Tensor) -> Any:
        """Call a forward, and keep nothing of it."""
        self._is_paused = True
        try:
            return forward(*tensors)
        finally:
            self._is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _changed(func, args, kwargs):
            self._writes.wait_for(tensor)
        result = func(*args, **kwargs)
        if self._is_paused or not is_product(func, args, kwargs):
            return result
        if not self._is_kept(cost_of(func, args, result)):
            self._operations.append(None)
            return result
        parts = (result,) if isinstance(result, Tensor) else tuple(result)
        tensors = [part if isinstance(part, Tensor) else None for part in parts]
        self._put(tensors)
        others = tuple(None if isinstance(part, Tensor) else part for part in parts)
        sizes = tuple(None if tensor is None else tensor.nbytes for tensor in tensors)
        self._operations.append(_Kept(func, others, sizes, isinstance(result, Tensor)))
        return result


@cache
def _changed_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Return place and name of the arguments that an operation writes to."""
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that an operation writes to."""
    for place, name in _changed_arguments(func):
        value = args[place] if len(args) > place else kwargs.get(name)
        yield from (one for one in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(one, Tensor))


class _Taking(DispatchMode):
    """Returns kept outputs in the place of products, in the order in which they were kept."""

    def __init__(self, operations: Sequence[_Kept | None], take: Callable[[int, int], Tensor]) -> None:
        super().__init__()
        self._operations, self._take, self._place = operations, take, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not is_product(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        place, self._place = self._place, self._place + 1
        kept = self._operations[place]
        if kept is None:
            return func(*args, **(kwargs or {}))
        assert kept.func is func, "a layer's second forward does what its first one did"
        parts = tuple(
            other if size is None else self._take(place, part)
            for part, (other, size) in enumerate(zip(kept.others, kept.sizes, strict=True))
        )
        return parts[0] if kept.is_one else parts

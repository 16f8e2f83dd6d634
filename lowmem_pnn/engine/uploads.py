"""Uploads: micro-batches on their way to the device, the next one while the present one is computed with."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from lowmem_pnn.device import Device
from lowmem_pnn.device.transfers import Upload
from lowmem_pnn.engine.loaders import Batch
from lowmem_pnn.engine.passes import to_device_aligned

_T = TypeVar("_T")


@dataclass(frozen=True)
class Piece:
    """Tensors of a micro-batch, on the host.

    Args:
        key: what it is known by, as long as it is on its way.
        tensors: gives them, each (M, ...); they may be views.
    """

    key: Hashable
    tensors: Callable[[], tuple[Tensor, ...]]

    @classmethod
    def of(cls, batch: Batch, part: slice, *, with_labels: bool = False) -> "Piece":
        """Some samples of a batch, which the piece keeps.

        Args:
            batch: boundary tensors and labels.
            part: which samples.
            with_labels: they come with the samples, after the boundary tensors.
        """

        def tensors() -> tuple[Tensor, ...]:
            inputs = tuple(tensor[part] for tensor in batch[0])
            return (*inputs, batch[1][part]) if with_labels else inputs

        return cls((id(batch), part.start, part.stop, with_labels), tensors)


class Uploads:
    """Brings pieces up, one ahead where the device copies beside its computing and its window has room for it.

    Args:
        device: open when pieces are taken.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        # What comes next, as far as is known: on its way, or, where the window has no room for it, still on the host.
        self._next: tuple[Piece, Upload | tuple[Tensor, ...]] | None = None

    def take(self, now: Piece, then: Piece | None = None) -> tuple[Tensor, ...]:
        """A piece's tensors on the device, 64-byte aligned; and the next one's are on their way.

        Args:
            now: wanted now; at best what was `then` the last time.
            then: what will be wanted next, as far as is known. Its copy begins after what was computed so far, so that it goes on
                beside what is computed now.
        """
        if self._device.shares_host:
            return tuple(to_device_aligned(self._device, tensor) for tensor in now.tensors())
        if self._next is not None and self._next[0].key != now.key:
            self.drop()  # the micro-batch became smaller
        found = now.tensors() if self._next is None else self._next[1]
        self._next = None
        placed = found.get() if isinstance(found, Upload) else tuple(self._device.to_device(tensor) for tensor in found)
        if then is not None:
            tensors = then.tensors()
            self._next = then, self._device.upload(tensors) or tensors
        return placed

    def over(self, items: Iterable[_T]) -> Iterator[tuple[_T, _T | None]]:
        """Each item with the one after it; at the end, however it comes, nothing is on its way any more.

        Args:
            items: what comes. Where the host is the device none is asked for before its turn, since two would take memory there, and
                the one after it is None.
        """
        if self._device.shares_host:
            for item in items:
                yield item, None
                del item  # or two would be there while the next one is waited for
            return
        try:
            iterator = iter(items)
            following: _T | None = next(iterator, None)
            while following is not None:
                item, following = following, next(iterator, None)
                yield item, following
                del item  # or three would be there while the next one is waited for
        finally:
            self.drop()

    def drop(self) -> None:
        """Give up what is on its way."""
        if self._next is not None:
            (_, waiting), self._next = self._next, None
            if isinstance(waiting, Upload):
                waiting.close()

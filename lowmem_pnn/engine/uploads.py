"""Uploads of micro-batches to the device: the next one is copied while the present one is computed with (double buffering)."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from lowmem_pnn.device import Device
from lowmem_pnn.device.transfers import Upload
from lowmem_pnn.engine.passes import to_device_aligned
from lowmem_pnn.stores.activations import Batch

_T = TypeVar("_T")


@dataclass(frozen=True)
class MicroBatch:
    """The host tensors of a micro-batch, taken when they are needed.

    Args:
        key: name of the micro-batch, unique among those of its batch and the next one.
        tensors: function that returns the tensors, each (M, ...); they may be views.
    """

    key: Hashable
    tensors: Callable[[], tuple[Tensor, ...]]

    @classmethod
    def of(cls, batch: Batch, part: slice, *, with_labels: bool = False) -> "MicroBatch":
        """Return some samples of a batch as a micro-batch, which holds the whole batch.

        Args:
            batch: boundary tensors and labels.
            part: range of the batch's samples.
            with_labels: whether the labels come too, after the boundary tensors.
        """

        def tensors() -> tuple[Tensor, ...]:
            inputs = tuple(tensor[part] for tensor in batch[0])
            return (*inputs, batch[1][part]) if with_labels else inputs

        return cls((id(batch), part.start, part.stop, with_labels), tensors)


class Uploads:
    """Copies micro-batches to the device, one ahead where the device copies beside its computing and allows one more in flight.

    Args:
        device: training device, open when micro-batches are taken.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        # The micro-batch that is expected next: being uploaded, or still on the host where too much is in flight.
        self._next: tuple[MicroBatch, Upload | tuple[Tensor, ...]] | None = None

    def take(self, micro_batch: MicroBatch, following: MicroBatch | None = None) -> tuple[Tensor, ...]:
        """Return a micro-batch's tensors on the device, 64-byte aligned, and begin the upload of the one after it.

        Args:
            micro_batch: the micro-batch that is needed now; uploaded already where it was `following` the last time.
            following: the micro-batch after it, as far as is known. Its upload begins after the computing that was asked for so far,
                and goes on beside the computing that is asked for next.
        """
        if self._device.shares_host:
            return tuple(to_device_aligned(self._device, tensor) for tensor in micro_batch.tensors())
        if self._next is not None and self._next[0].key != micro_batch.key:
            self.drop()  # the micro-batch became smaller
        source = micro_batch.tensors() if self._next is None else self._next[1]
        self._next = None
        on_device = source.get() if isinstance(source, Upload) else tuple(self._device.to_device(tensor) for tensor in source)
        if following is not None:
            tensors = following.tensors()
            self._next = following, self._device.upload(tensors) or tensors
        return on_device

    def with_following(self, items: Iterable[_T]) -> Iterator[tuple[_T, _T | None]]:
        """Yield each item with the one after it, and drop the upload under way at the end of the iteration, however it ends.

        Args:
            items: batches. Where host and device are one, each is asked for at its own turn, since two would take memory there, and
                the item after it is given as None.
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
        """Drop the upload under way."""
        if self._next is not None:
            (_, source), self._next = self._next, None
            if isinstance(source, Upload):
                source.close()

"""Packs: tensors that go to the device, and come back from it, in one copy, side by side in a buffer of bytes.

    files --> [ weight | bias | mean ] on the host --one copy--> [ weight | bias | mean ] on the device, all in one memory
    files <-- [ weight | bias ]        on the host <--one copy-- what of it has changed

A copy costs the driver, and the thread that asks for it, the same whatever its size, and a layer has a dozen tensors. Where host and
device are one nothing is copied, and every tensor keeps memory of its own.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lowmem_pnn.memory.aligned import ALIGNMENT


@dataclass(frozen=True)
class Piece:
    """A tensor of the weight files, or some of its elements.

    Args:
        key: name of the tensor in the files.
        elements: elements, in the order of the file; None for all of them, in the tensor's shape.
        pack: pieces after one another with the same pack are taken at the same time, and may go to the device in one copy; None for a
            piece by itself.
    """

    key: str
    elements: slice | None = None
    pack: Hashable = None


@dataclass(frozen=True)
class Write:
    """A tensor that is to be written.

    Args:
        key: name of the tensor in the file.
        tensor: tensor on the device.
        first: first of the elements in the file's tensor; None for all of its elements.
    """

    key: str
    tensor: Tensor
    first: int | None = None


@dataclass(frozen=True)
class Place:
    """The place of a tensor in a buffer.

    Args:
        begin: first byte.
        nbytes: bytes of the tensor.
        dtype: type of its elements.
        shape: shape in elements.
    """

    begin: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensor in a buffer of bytes.

        No view of the buffer's: to autograd, views change together, and BatchNorm's statistics change while weights must not.
        """
        offset = (buffer.storage_offset() + self.begin) // self.dtype.itemsize
        empty = torch.empty(0, dtype=self.dtype, device=buffer.device)
        return empty.set_(buffer.untyped_storage(), offset, self.shape)  # type: ignore[call-overload, no-any-return]


def places_of(specs: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> tuple[list[Place], int]:
    """Lay tensors out one after the other, each at a multiple of 64 bytes, as layers compute with them.

    Args:
        specs: type and shape of each.

    Returns:
        Their places, and the bytes of the buffer.

    Example:
        >>> places, size = places_of([(torch.float32, (3, 5)), (torch.int64, ())])
        >>> [(place.begin, place.nbytes) for place in places], size
        ([(0, 60), (64, 8)], 72)
    """
    places, end = [], 0
    for dtype, shape in specs:
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        place = Place(begin, prod(shape) * dtype.itemsize, dtype, shape)
        places.append(place)
        end = begin + place.nbytes
    return places, end


def by_buffer(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[tuple[int, Place]]]]:
    """Group tensors by the memory that they lie in.

    Args:
        tensors: contiguous tensors on the device.

    Yields:
        For each memory the bytes from the first of its tensors to the last, and the number of each tensor with its place in them.
    """
    groups: dict[int, list[int]] = {}
    for number, tensor in enumerate(tensors):
        assert tensor.is_contiguous(), "what is stepped or kept is dense"
        groups.setdefault(tensor.untyped_storage()._cdata, []).append(number)
    for numbers in groups.values():
        begins = {number: int(tensors[number].storage_offset()) * tensors[number].element_size() for number in numbers}
        begin = min(begins.values())
        end = max(begins[number] + tensors[number].nbytes for number in numbers)
        first = tensors[numbers[0]]
        empty = torch.empty(0, dtype=torch.uint8, device=first.device)
        span = empty.set_(first.untyped_storage(), begin, (end - begin,))  # type: ignore[call-overload]
        yield (
            span,
            [
                (number, Place(begins[number] - begin, one.nbytes, one.dtype, tuple(one.shape)))
                for number in numbers
                for one in (tensors[number],)
            ],
        )

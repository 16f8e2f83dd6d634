"""The host tier: weights and optimizer state that stay in host memory from one batch to the next, and reach their files at a commit.

    files --first batch--> device --stepped--> [ host tier ] --next batch--> device --stepped--> [ host tier ] ...
                                                     |
                                                     +--before a commit--> files

Without it every step writes all weights and state to files, at the rate of the drive once the system's cache of dirty pages is full. What
has no room stays in files: weights are given room first, since a step reads them twice. Where host and device are one there is no tier.
"""

from collections.abc import Iterable, Iterator
from math import prod

from torch import Tensor

from lowmem_pnn.memory.aligned import PAGE_BYTES, aligned_empty
from lowmem_pnn.stores.header import TensorLayout

_SHARE = 2


def tier_bytes_of(max_host_mem: int | None, available_bytes: int) -> int:
    """Return the size that a tier may have: half of the bound on host memory, else half of what is available.

    Args:
        max_host_mem: bound on host memory; None where there is none.
        available_bytes: host memory that can be had without swapping.

    Example:
        >>> tier_bytes_of(None, 16_000_000_000), tier_bytes_of(2_000_000_000, 16_000_000_000)
        (8000000000, 1000000000)
    """
    return (available_bytes if max_host_mem is None else min(max_host_mem, available_bytes)) // _SHARE


class HostTier:
    """Tensors of weight files in host memory. Written on one thread and read on another, each tensor after it was written.

    Args:
        layouts: names, types and shapes of all tensors that are moved, in the order in which they are given room.
        capacity_bytes: most bytes.
    """

    def __init__(self, layouts: Iterable[tuple[str, TensorLayout]], capacity_bytes: int) -> None:
        self._layouts: dict[str, TensorLayout] = {}
        for key, (dtype, shape) in layouts:
            nbytes = dtype.itemsize * prod(shape)
            if nbytes <= capacity_bytes:
                self._layouts[key] = dtype, shape
                capacity_bytes -= nbytes
        self._tensors: dict[str, Tensor] = {}
        # To be written in the present batch; whole since an earlier one; newer than in their files, of which partition.
        self._expected: set[str] = set()
        self._whole: set[str] = set()
        self._unsaved: dict[str, int] = {}

    def expect(self, key: str) -> None:
        """Note that a tensor will have been written when the writes of the present batch are done; on the thread that computes."""
        if key in self._layouts:
            self._expected.add(key)

    def has(self, key: str) -> bool:
        """Decide whether a tensor is read from here; asked when the writes of earlier batches are done."""
        return key in self._whole and key in self._tensors

    def put(self, partition: int, key: str, tensor: Tensor, first: int | None) -> bool:
        """Keep a tensor, or some elements of one, in place of writing it to its file.

        Args:
            partition: partition whose file it belongs to.
            key: name of the tensor.
            tensor: values, on the host, contiguous.
            first: first of the elements; None for all.

        Returns:
            Whether it was kept: there may be no room, or the system may refuse the memory.
        """
        if key not in self._layouts:
            return False
        if key not in self._tensors:
            dtype, shape = self._layouts[key]
            try:
                self._tensors[key] = aligned_empty(shape, dtype, alignment=PAGE_BYTES)
            except (RuntimeError, MemoryError):
                del self._layouts[key]
                return False
        begin = first or 0
        self._tensors[key].view(-1)[begin : begin + tensor.numel()].copy_(tensor.reshape(-1))
        self._unsaved[key] = partition
        return True

    def read(self, key: str, elements: slice | None, target: Tensor) -> None:
        """Fill a host tensor with a tensor of the tier, or with some of its elements."""
        source = self._tensors[key]
        target.copy_(source if elements is None else source.view(-1)[elements])

    def end_batch(self) -> None:
        """Have what is expected be read from here from now on: a batch reads nothing that it has written itself."""
        self._whole |= self._expected
        self._expected.clear()

    def unsaved(self) -> Iterator[tuple[int, list[tuple[str, Tensor]]]]:
        """Yield, by partition, what is newer than in the files, and forget that it is."""
        by_partition: dict[int, list[tuple[str, Tensor]]] = {}
        for key, partition in self._unsaved.items():
            by_partition.setdefault(partition, []).append((key, self._tensors[key]))
        self._unsaved.clear()
        yield from by_partition.items()

    def clear(self) -> None:
        """Forget everything: what is in the files counts."""
        for held in (self._tensors, self._expected, self._whole, self._unsaved):
            held.clear()

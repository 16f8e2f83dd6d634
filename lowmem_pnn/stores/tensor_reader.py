"""Reader of single tensors of a weight store, from whichever partition's file holds them; files are opened as they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from lowmem_pnn.memory.aligned import HostAllocator
from lowmem_pnn.stores.keys import PartitionName
from lowmem_pnn.stores.tensor_file import TensorFile


class TensorReader:
    """Reader of tensors by their name in the weight files; get one from `WeightStore.tensor_reader`.

    Args:
        partition_of: Returns the partition whose file holds a tensor.
        open_file: Opens a partition's newest file.
        allocate: Allocates the tensors that are filled; None for fresh memory.
    """

    def __init__(
        self,
        partition_of: Callable[[str], PartitionName],
        open_file: Callable[[PartitionName], TensorFile],
        allocate: HostAllocator | None = None,
    ) -> None:
        self._partition_of = partition_of
        self._open_file = open_file
        self._allocate = allocate
        self._lock = threading.Lock()
        self._files: dict[PartitionName, TensorFile] = {}

    def read(self, key: str, elements: slice | None = None, allocate: HostAllocator | None = None) -> Tensor:
        """Read a tensor, or some of its elements as a flat tensor, into memory that starts at a multiple of 64 bytes.

        Args:
            key: Name of the tensor in the files.
            elements: Elements, in the order of the file; None for all of them, in the tensor's shape.
            allocate: Allocates this one; None for the reader's own function.

        Raises:
            CheckpointError: No file holds the tensor, or the elements.
        """
        return self.open(self._partition_of(key)).read(key, allocate or self._allocate, elements)

    def open(self, partition: PartitionName) -> TensorFile:
        """Return a partition's open file: the file that was the newest when it was first asked for."""
        with self._lock:
            if partition not in self._files:
                self._files[partition] = self._open_file(partition)
            return self._files[partition]

    def close(self) -> None:
        """Close the files, whatever the file system says to it: they were only read."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        self._files.clear()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

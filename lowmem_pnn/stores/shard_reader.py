"""Reader of the shards of one store: opens and checks them, and reads them whole into rows of tensors in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.memory.aligned import PAGE_BYTES, aligned_empty
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.activation_index import Index
from lowmem_pnn.stores.disk import RUN_REMEDY, IoCounter
from lowmem_pnn.stores.header import TensorLayout
from lowmem_pnn.stores.shard_file import ShardFile
from lowmem_pnn.stores.shard_layout import (
    describe_all,
    group_by_boundary_tensor,
    resident_bytes,
    shard_layout,
    shard_metadata,
    shard_name,
)
from lowmem_pnn.stores.tensor_file import TensorFile


class ShardReader:
    """Reader of the shards of one store, for one thread, or for a thread that reads ahead.

    Args:
        folder: Folder of the store.
        index: Index of the store.
        counter: Counts the bytes read.
        direct: Whether shards are read past the page cache, and not kept there for the next epoch.
    """

    specs: tuple[TensorSpec, ...]
    """Shapes and element types of one sample's boundary tensors."""
    samples: list[int]
    """Number of samples in each shard."""
    shard_samples: int
    """Samples in every shard but the last, which may have fewer."""

    def __init__(self, folder: Path, index: Index, counter: IoCounter | None, direct: bool) -> None:
        self.specs = tuple(TensorSpec(shape, dtype) for dtype, shape in index.tensors)
        self.samples = [shard.samples for shard in index.shards]
        self.shard_samples = index.shard_samples
        self._folder = folder
        self._index = index
        self._counter = counter
        self._direct = direct

    def resident_bytes(self, num_samples: int) -> int:
        """Return the bytes that samples take in memory, as they are stored, with the order in which batches are drawn from them."""
        return resident_bytes(self.specs, num_samples, self._index.labels, self._index.kept_as)

    def allocate(self, num_samples: int) -> list[Tensor]:
        """Allocate tensors for samples as they are stored, each from the start of a page; the labels last."""
        return [aligned_empty(shape, dtype, alignment=PAGE_BYTES) for dtype, shape in self._layout(num_samples).values()]

    def group(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Group allocated tensors: for each boundary tensor its values and scales, and last the labels."""
        return group_by_boundary_tensor(tensors, self.specs, self._index.kept_as)

    def prepare(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> list[ShardFile]:
        """Do the part of reading shards that needs no file, so that the thread which reads goes from one shard to the next.

        Args:
            numbers: Numbers of the shards.
            tensors: Allocated tensors, whose rows the shards fill one behind the other.

        Returns:
            The files' contents, over rows of `tensors`, for `read`.
        """
        shard_files, row = [], 0
        for number in numbers:
            count = self.samples[number]
            rows = {name: tensor[row : row + count] for name, tensor in zip(self._layout(count), tensors, strict=True)}
            shard_files.append(ShardFile(rows, shard_metadata(number)))
            row += count
        return shard_files

    def read(self, numbers: Sequence[int], tensors: Sequence[Tensor], shard_files: Sequence[ShardFile]) -> None:
        """Read whole shards into consecutive rows of tensors.

        Args:
            numbers: Numbers of the shards.
            tensors: Allocated tensors.
            shard_files: Result of `prepare` for the same shards and tensors.

        Raises:
            CheckpointError: A shard was damaged since the store was opened.
            DiskError: The file system refused.
        """
        row = 0
        for number, shard_file in zip(numbers, shard_files, strict=True):
            count = self.samples[number]
            if not shard_file.read(self._folder / shard_name(number), self._counter, direct=self._direct):
                self._read_by_tensors(number, [tensor[row : row + count] for tensor in tensors])
            row += count

    def open(self, number: int) -> TensorFile:
        """Open a shard and compare its header with the index.

        Raises:
            CheckpointError: The shard is missing, damaged, in another's place, or holds something else than the index says.
            DiskError: The file system refused.
        """
        path = self._folder / shard_name(number)
        file = TensorFile.open(path, counter=self._counter, remedy=RUN_REMEDY)
        expected = self._layout(self.samples[number])
        actual = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        written_as = file.metadata.get("shard")
        if actual == expected and written_as == str(number):
            return file
        file.close()
        if actual == expected:
            fault = f"holds shard {written_as} of a store, in the place of shard {number}"
        else:
            fault = f"holds {describe_all(actual.values())}, the index says {describe_all(expected.values())}"
        raise CheckpointError(f"{str(path)!r} {fault}; {RUN_REMEDY}")

    def _read_by_tensors(self, number: int, rows: list[Tensor]) -> None:
        """Read a shard that is not laid out as this version does it; of a damaged one say what is wrong."""
        with self.open(number) as file:
            for name, tensor in zip(self._layout(self.samples[number]), rows, strict=True):
                file.read_into(name, tensor)
            if self._direct:
                file.drop_cache()

    def _layout(self, num_samples: int) -> dict[str, TensorLayout]:
        return shard_layout(self.specs, num_samples, self._index.labels, self._index.kept_as)

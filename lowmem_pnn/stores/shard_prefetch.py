"""Prefetch of shards: reads the next window (a group of shards) ahead while batches are drawn from the present one."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.memory.aligned import byte_view
from lowmem_pnn.seeds import permutation_of
from lowmem_pnn.stores.disk import CHUNK_BYTES
from lowmem_pnn.stores.encoding import decode
from lowmem_pnn.stores.shard_file import ShardFile
from lowmem_pnn.stores.shard_reader import ShardReader


@dataclass
class Window:
    """Shards that are in memory at one time: samples [begin, end) of an iteration's order."""

    tensors: list[list[Tensor]]
    """For each boundary tensor its values and scales, and last the labels."""
    begin: int
    end: int
    order: npt.NDArray[np.int64] | None
    """Row of each sample; None where the rows are in order."""

    def copy_rows(self, position: int, count: int, batch: list[Tensor], row: int) -> None:
        """Copy samples [position, position + count) into rows of a batch, decoded, from row `row` on."""
        first = position - self.begin
        for stored, target in zip(self.tensors, batch, strict=True):
            if target.nbytes == 0:
                continue
            if stored[0].dtype == target.dtype:
                self._copy(stored[0], first, count, target[row : row + count])
            else:
                self._decode(stored, first, count, target[row : row + count])

    def _copy(self, source: Tensor, first: int, count: int, target: Tensor) -> None:
        # As rows of bytes every element type is copied bit for bit.
        source_bytes = byte_view(source).reshape(len(source), -1)
        target_bytes = byte_view(target).reshape(count, -1)
        if self.order is None:
            target_bytes[:] = source_bytes[first : first + count]
        else:
            # With mode="raise" numpy would go through a buffer of the output's size.
            np.take(source_bytes, self.order[first : first + count], axis=0, out=target_bytes, mode="clip")

    def _decode(self, stored: list[Tensor], first: int, count: int, target: Tensor) -> None:
        at_once = max(1, CHUNK_BYTES // sum(tensor[0].nbytes for tensor in stored))
        for begin in range(0, count, at_once):
            span = slice(first + begin, first + min(begin + at_once, count))
            if self.order is None:
                rows = [tensor[span] for tensor in stored]
            elif at_once == 1:  # a copy of a large sample would be memory that nobody has planned
                row = int(self.order[span.start])
                rows = [tensor[row : row + 1] for tensor in stored]
            else:
                index = torch.from_numpy(self.order[span])
                rows = [tensor.index_select(0, index) for tensor in stored]
            decode(rows, target[begin : begin + at_once])


def prefetched_windows(
    reader: ShardReader, seed: int | None, epoch: int, first: int, stop: int, window_bytes: int, pool: Executor
) -> Generator[Window, None, None]:
    """Yield the windows that hold samples [first, stop) of an iteration's order, and read the next one ahead where two fit.

    Closing the generator ends the reading ahead.

    Args:
        reader: Reads the shards.
        seed: Seed of the run, for the order of shards and of the samples in each window; None for the stored order.
        epoch: Number of the epoch, from 0.
        first: First sample.
        stop: Sample after the last.
        window_bytes: Memory for both windows; one shard is read at a time if it holds fewer than two.
        pool: Runs the reading ahead.

    Raises:
        CheckpointError: A shard was damaged since the store was opened.
        DiskError: The file system refused.
    """
    samples = reader.samples
    shard_order = shuffled_order(len(samples), seed, "shards", epoch)
    shards: list[int] = list(range(len(samples))) if shard_order is None else shard_order.tolist()
    shard_bytes = reader.resident_bytes(reader.shard_samples)
    per_window = max(1, window_bytes // 2 // shard_bytes)
    groups = [shards[begin : begin + per_window] for begin in range(0, len(shards), per_window)]
    bounds = [0, *accumulate(sum(samples[number] for number in group) for group in groups)]
    needed = [number for number in range(len(groups)) if bounds[number] < stop and first < bounds[number + 1]]

    def read(number: int, tensors: list[Tensor], shard_files: list[ShardFile]) -> Window:
        reader.read(groups[number], tensors, shard_files)
        begin, end = bounds[number], bounds[number + 1]
        return Window(reader.group(tensors), begin, end, shuffled_order(end - begin, seed, "window", epoch, number))

    rows = min(per_window * reader.shard_samples, sum(samples))
    reads_ahead = len(needed) > 1 and 2 * per_window * shard_bytes <= window_bytes
    present = reader.allocate(rows)
    following = reader.allocate(rows) if reads_ahead else present
    ahead: Future[Window] | None = None
    try:
        for number, next_number in zip(needed, [*needed[1:], None], strict=True):
            window = ahead.result() if ahead is not None else read(number, present, reader.prepare(groups[number], present))
            if reads_ahead:
                ahead = None
                if next_number is not None:
                    ahead = pool.submit(read, next_number, following, reader.prepare(groups[next_number], following))
                present, following = following, present
            yield window
    finally:
        # A job that ran on would use memory that the caller takes for free.
        if ahead is not None and not ahead.cancel():
            wait([ahead])


def shuffled_order(size: int, seed: int | None, *key: int | str) -> npt.NDArray[np.int64] | None:
    """Return a random permutation of [0, size), or None without a seed.

    Args:
        size: Number of things to order.
        seed: Seed of the run.
        *key: Numbers and words that name a place in the run.
    """
    return None if seed is None else permutation_of(size, seed, *key)

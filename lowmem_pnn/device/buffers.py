"""Sizes of the buffers between disk, host and device: a small share of the budget."""

from dataclasses import dataclass

from lowmem_pnn.device.transfers import window_of
from lowmem_pnn.units import MEBIBYTE


@dataclass(frozen=True)
class BufferSizes:
    """Sizes of the buffers between disk and device, a small share of the budget.

    Args:
        shard_bytes: of one shard of boundary activations; two are held while they are written.
        window_bytes: shards that are held while they are read, in use and ahead together.
        stream_bytes: weights and optimizer state of a sweep that were read ahead, and as many that wait to be written.
        boundary_bytes: of a sweep's boundary activations and gradients that are kept in memory; the others go to disk.
        transfer_bytes: on a device that is not the host: what was copied up ahead of its use, or is being copied down.
    """

    shard_bytes: int
    window_bytes: int
    stream_bytes: int
    boundary_bytes: int
    transfer_bytes: int

    @classmethod
    def of_budget(cls, budget_bytes: int) -> "BufferSizes":
        """A sixty-fourth of the budget a shard, between 256 KiB and 16 MiB; four shards a window, a stream, and for boundaries."""
        shard = min(max(budget_bytes // 64, MEBIBYTE // 4), 16 * MEBIBYTE)
        return cls(shard, 4 * shard, 4 * shard, 4 * shard, window_of(budget_bytes))

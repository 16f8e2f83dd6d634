"""Sizes of the buffers between disk, host and device: small shares of the budget."""

from dataclasses import dataclass

from lowmem_pnn.device.transfers import in_flight_bytes_of
from lowmem_pnn.units import MEBIBYTE

_FLOAT_BYTES = 4
_MOST_SLICE_BYTES = 8 * MEBIBYTE


@dataclass(frozen=True)
class BufferSizes:
    """Sizes of the buffers between disk, host and device.

    Args:
        shard_bytes: size of one shard of boundary activations; two are held while they are written.
        window_bytes: size of the shards that are held while they are read, in use and prefetched together.
        stream_bytes: size of the weights and optimizer state that a sweep has prefetched, and of as many that wait to be written.
        boundary_bytes: size of the boundary activations and gradients that a sweep keeps in memory; the others go to disk.
        transfer_bytes: device memory of copies in flight, on a device that is not the host: uploads ahead of their use, and downloads.
        slice_elements: elements of parameters that an optimizer step of a sweep takes at one time.
    """

    shard_bytes: int
    window_bytes: int
    stream_bytes: int
    boundary_bytes: int
    transfer_bytes: int
    slice_elements: int

    @classmethod
    def of_budget(cls, budget_bytes: int) -> "BufferSizes":
        """Derive all sizes from the budget.

        A shard is a sixty-fourth of the budget, between 256 KiB and 16 MiB; window and boundary buffers are four shards each, a
        stream is two: where there is room for longer ones plans have them.
        A slice has as many float32 as fit a shard, rounded down to a power of two, and no more than 8 MiB of them.
        """
        shard = min(max(budget_bytes // 64, MEBIBYTE // 4), 16 * MEBIBYTE)
        elements = 1 << (min(shard, _MOST_SLICE_BYTES) // _FLOAT_BYTES).bit_length() - 1
        return cls(shard, 4 * shard, 2 * shard, 4 * shard, in_flight_bytes_of(budget_bytes), elements)

    def samples_at_once(self, boundary: int, sample_bytes: int, batch: int, smallest: int) -> int:
        """Return how many samples are read at once where nothing learns.

        From the data set a batch, as where something learns; of stored ones no more than half a window holds, for one reading is ahead.

        Args:
            boundary: boundary where the samples are read: 0 is the data set.
            sample_bytes: bytes of a sample there.
            batch: samples of an optimizer step, the most that are read.
            smallest: samples that modules take at least.

        Example:
            >>> BufferSizes.of_budget(64_000_000).samples_at_once(3, 500_000, 64, smallest=1)
            4
        """
        return batch if boundary == 0 else min(batch, max(smallest, self.window_bytes // max(1, 2 * sample_bytes)))

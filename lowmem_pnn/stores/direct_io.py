"""Direct I/O: transfers between memory and the pages of a file, past the system's page cache (O_DIRECT).

Through the page cache every byte is copied once more, into pages that are taken from everybody else and that cost more to get than
to fill. A direct transfer moves bytes between the drive and the caller's memory. In exchange it works by whole pages: the offset in
the file, the address in memory and the length are multiples of `PAGE_BYTES`.

A range of a file often lies in memory in *pieces*: a header here, a tensor there. Pages that one piece fills, and that start at a
page in memory too, move straight; the others, at the pieces' ends, are put together in a scratch buffer. All of it is one request:

    file     | page | page | page | page | page |
    pieces   |header.|tensor ........|labels.|
    moves    |scratch| straight   |  scratch  |

Not every file system takes direct transfers, and none has to: `open_direct` returns None, or a transfer raises OSError with one of
`REFUSED`, and the caller goes through the page cache.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Sequence

import numpy as np

from lowmem_pnn.memory.aligned import PAGE_BYTES

Piece = tuple[int, memoryview]
"""Offset of bytes in the file, and their memory."""

_MOST_SCRATCH_BYTES = 1 << 18
_MOST_SEGMENTS = 1024  # of one call: IOV_MAX of Linux

LEAST_BYTES = 1 << 18
"""Transfers of fewer bytes go through the page cache: the drive would take longer to answer than to move them."""
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
"""Error numbers of file systems that do not take a direct transfer."""


def open_direct(path: str | os.PathLike[str], *, writable: bool) -> int | None:
    """Open an existing file for direct transfers.

    Returns:
        The descriptor; None if the system or the file system has no direct transfers.

    Raises:
        OSError: The file cannot be opened at all.
    """
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_DIRECT)
    except OSError as error:
        if error.errno in REFUSED:
            return None
        raise


class Transfer:
    """Direct transfer of one range of a file, from or into pieces of memory.

    Args:
        pieces: Pieces one after the other, without a gap, from a multiple of `PAGE_BYTES` on. Where the last ends inside a page, the
            rest of that page is zeros in the file (which may then be cut), and is not looked at when it is read.

    Example:
        >>> Transfer([(0, memoryview(b"header, labels: not worth a request of their own"))]).is_worthwhile
        False
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = [piece for piece in pieces if len(piece[1])]
        self.begin, self.end = self._pieces[0][0], self._pieces[-1][0] + len(self._pieces[-1][1])
        """First byte of the range in the file, and the byte after the last."""
        assert self.begin % PAGE_BYTES == 0, "a direct transfer starts at a page"
        self._straight: list[Piece] = []
        for offset, memory in self._pieces:
            first, stop = _round_up(offset), (offset + len(memory)) // PAGE_BYTES * PAGE_BYTES
            if first < stop and (_address(memory) + first - offset) % PAGE_BYTES == 0:
                self._straight.append((first, memory[first - offset : stop - offset]))
        self._scratch_bytes = _round_up(self.end) - self.begin - sum(len(memory) for _, memory in self._straight)

    @property
    def is_worthwhile(self) -> bool:
        """Whether the range is large and most bytes move straight; to copy most of them into scratch would only take memory."""
        straight_bytes = _round_up(self.end) - self.begin - self._scratch_bytes
        scratch_is_small = self._scratch_bytes <= min(straight_bytes, _MOST_SCRATCH_BYTES)
        return scratch_is_small and straight_bytes >= LEAST_BYTES and 2 * len(self._straight) < _MOST_SEGMENTS

    def write(self, descriptor: int) -> bool:
        """Write the pieces, and zeros after them up to a page's end.

        Returns:
            Whether all bytes were written: the system may stop inside a page, as on a disk that is nearly full, from where no direct
            transfer goes on.

        Raises:
            OSError: The file system refused; with one of `REFUSED` if it takes no direct transfers.
        """
        return self._run(os.pwritev, descriptor, gather=True) == self.end - self.begin

    def read(self, descriptor: int) -> int:
        """Fill the pieces from the file.

        Returns:
            The number of bytes that were read: fewer than asked for where the file ends early.

        Raises:
            OSError: The file system refused; with one of `REFUSED` if it takes no direct transfers.
        """
        return self._run(os.preadv, descriptor, gather=False)

    def _run(self, call: Callable[[int, list[memoryview], int], int], descriptor: int, *, gather: bool) -> int:
        scratch = memoryview(mmap.mmap(-1, self._scratch_bytes or PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        via_scratch: list[Piece] = []
        used, end = 0, self.begin
        for offset, memory in [*self._straight, (_round_up(self.end), memoryview(b""))]:
            if offset > end:
                via_scratch.append((end, scratch[used : used + offset - end]))
                used += offset - end
            end = offset + len(memory)
        if gather:
            for target, source in self._overlaps(via_scratch):
                target[:] = source
        segments = sorted([*self._straight, *via_scratch], key=lambda segment: segment[0])
        done = _move(call, descriptor, segments)
        if not gather:
            for source, target in self._overlaps(via_scratch):
                target[:] = source
        return min(done, self.end - self.begin)

    def _overlaps(self, via_scratch: Sequence[Piece]) -> list[tuple[memoryview, memoryview]]:
        """Return the memory of the same bytes in scratch and in the pieces, as pairs."""
        pairs = []
        for start, scratch in via_scratch:
            for offset, memory in self._pieces:
                first, stop = max(start, offset), min(start + len(scratch), offset + len(memory))
                if first < stop:
                    pairs.append((scratch[first - start : stop - start], memory[first - offset : stop - offset]))
        return pairs


def is_page_aligned(offset: int, memory: memoryview) -> bool:
    """Decide whether bytes are whole pages, in the file and in memory.

    Args:
        offset: Offset of the bytes in the file.
        memory: Memory of the bytes, to write from or to read into.
    """
    return offset % PAGE_BYTES == 0 and len(memory) % PAGE_BYTES == 0 and _address(memory) % PAGE_BYTES == 0


def _move(call: Callable[[int, list[memoryview], int], int], descriptor: int, segments: Sequence[Piece]) -> int:
    """Move segments that follow each other, in as few calls as the system needs; return the bytes moved, up to the file's end."""
    begin, rest = segments[0][0], [memory for _, memory in segments]
    done = 0
    while rest:
        count = call(descriptor, rest, begin + done)
        done += count
        if count == 0 or done % PAGE_BYTES:  # the file's end
            break
        while rest and count >= len(rest[0]):
            count -= len(rest.pop(0))
        if count:
            rest[0] = rest[0][count:]
    return done


def _round_up(offset: int) -> int:
    return -(-offset // PAGE_BYTES) * PAGE_BYTES


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0])

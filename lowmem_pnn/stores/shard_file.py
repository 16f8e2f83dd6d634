"""Shard file: a whole safetensors file in memory, header and tensors, read or written past the page cache in one request."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.memory.aligned import byte_view
from lowmem_pnn.stores.direct_io import REFUSED, Piece, Transfer, open_direct
from lowmem_pnn.stores.disk import RUN_REMEDY, IoCounter, disk_error, drop_cache, open_regular, sync_file
from lowmem_pnn.stores.header import lay_out
from lowmem_pnn.units import format_bytes


class ShardFile:
    """Whole content of a safetensors file with some tensors, byte for byte.

    Args:
        tensors: All tensors of the file, contiguous, on the CPU; their memory is shared.
        metadata: Texts for the header.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "x.safetensors"
        >>> ShardFile({"x": torch.tensor([1.0, 2.0])}, {}).write(path).close()
        >>> back = torch.empty(2)
        >>> ShardFile({"x": back}, {}).read(path), back.tolist()
        (True, [1.0, 2.0])
        >>> folder.cleanup()
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self._header, entries = lay_out(layout, metadata)
        self._tensors: list[Piece] = sorted(
            ((entries[name].offset, byte_view(tensor).data) for name, tensor in tensors.items() if tensor.nbytes),
            key=lambda piece: piece[0],
        )
        self.nbytes = len(self._header) + sum(len(memory) for _, memory in self._tensors)
        # For reading; for writing the header itself is used.
        self._header_read = bytearray(len(self._header))
        self._transfer = Transfer([(0, memoryview(self._header_read)), *self._tensors])

    def crc32(self) -> str:
        """Return the CRC-32 of the file's bytes, as eight hexadecimal digits."""
        value = zlib.crc32(self._header)
        for _, memory in self._tensors:
            value = zlib.crc32(memory, value)
        return f"{value:08x}"

    def write(self, path: Path, counter: IoCounter | None = None) -> NewFile:
        """Create the file and write it: `NewFile.create`, and `write_into`."""
        file = NewFile.create(path, self.nbytes)
        try:
            self.write_into(file, counter)
        except BaseException:
            file.close()
            raise
        return file

    def write_into(self, file: NewFile, counter: IoCounter | None = None) -> None:
        """Fill a new file, past the page cache where the file system lets us; else the cache is asked to drop its pages.

        Args:
            file: New file of `nbytes` bytes.
            counter: Counts the bytes written.

        Raises:
            DiskError: The disk is full, or the file system refused.
        """
        pieces: list[Piece] = [(0, memoryview(self._header)), *self._tensors]
        try:
            if not (self._transfer.is_worthwhile and file.write_direct(Transfer(pieces))):
                _write_through_cache(file.descriptor, pieces)
                drop_cache(file.descriptor)
        except OSError as error:
            raise disk_error(file.path, error, f"write {format_bytes(self.nbytes)}") from error
        if counter is not None:
            counter.add(written=self.nbytes)

    def read(self, path: Path, counter: IoCounter | None = None, *, direct: bool = False) -> bool:
        """Fill the tensors from a file.

        Args:
            path: Path of the file.
            counter: Counts the bytes read.
            direct: Whether to read past the page cache, if the file system lets us; else through the cache, which drops the pages
                afterwards.

        Returns:
            Whether the file is there, and has this header and this size: else tensors may hold anything.

        Raises:
            CheckpointError: Something else than a file is there.
            DiskError: The file system refused.
        """
        try:
            descriptor = open_regular(path, remedy=RUN_REMEDY, kind="shard")
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise disk_error(path, error, "open it") from error
        try:
            if os.fstat(descriptor).st_size != self.nbytes:
                return False
            done = self._read_direct(path) if direct else None
            if done is None:
                done = _read_through_cache(descriptor, [(0, memoryview(self._header_read)), *self._tensors])
                if direct:
                    drop_cache(descriptor)
        except OSError as error:
            raise disk_error(path, error, f"read {format_bytes(self.nbytes)}") from error
        finally:
            os.close(descriptor)
        if counter is not None:
            counter.add(read=done)
        return done == self.nbytes and self._header_read == self._header

    def _read_direct(self, path: Path) -> int | None:
        """Read past the page cache; return the number of bytes read, or None if the file takes no direct transfers."""
        descriptor = open_direct(path, writable=False) if self._transfer.is_worthwhile else None
        if descriptor is None:
            return None
        try:
            return self._transfer.read(descriptor)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return None
        finally:
            os.close(descriptor)


class NewFile:
    """New file that is not synced yet: it stays open, since only who has a file open is sure to be told of a failed write.

    The file may be longer than it should be until it is synced or closed: the rest of the last page is cut off only then, since the
    file system may make one wait for the cut.

    Args:
        path: Path of the file.
        descriptor: Open descriptor; closed with the file.
        direct: Second descriptor, for transfers past the page cache; None where the file system has none.
        nbytes: Bytes that the file will have.
    """

    def __init__(self, path: Path, descriptor: int, direct: int | None, nbytes: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._direct = direct
        self._nbytes = nbytes

    @classmethod
    def create(cls, path: Path, nbytes: int) -> NewFile:
        """Create an empty file that will have `nbytes` bytes.

        Raises:
            CheckpointError: The file is there already.
            DiskError: The file system refused.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                return cls(path, descriptor, open_direct(path, writable=True), nbytes)
            except BaseException:
                os.close(descriptor)
                raise
        except FileExistsError:
            raise CheckpointError(f"cannot create {str(path)!r}: it exists already; delete it, or use another folder") from None
        except OSError as error:
            raise disk_error(path, error, f"write {format_bytes(nbytes)}") from error

    def write_direct(self, transfer: Transfer) -> bool:
        """Write past the page cache.

        Returns:
            Whether all is written: else it is to be written once more, through the cache.

        Raises:
            OSError: The file system takes direct transfers, and refused this one.
        """
        if self._direct is None:
            return False
        try:
            return transfer.write(self._direct)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return False

    def sync(self) -> None:
        """Wait until all bytes written are on the drive.

        Raises:
            DiskError: They are not, and may never be.
        """
        self._cut()
        sync_file(self.path, self.descriptor)

    def sync_and_close(self) -> None:
        """Sync the file, and close it whether or not that succeeds.

        Raises:
            DiskError: Not all bytes are on the drive.
        """
        try:
            self.sync()
        finally:
            self.close()

    def close(self) -> None:
        """Close the file, without syncing it.

        Raises:
            DiskError: The file could not be cut to its size.
        """
        if self.descriptor >= 0:
            try:
                self._cut()
            finally:
                for descriptor in (self.descriptor, self._direct):
                    if descriptor is not None:
                        os.close(descriptor)
                self.descriptor = -1

    def _cut(self) -> None:
        try:
            if os.fstat(self.descriptor).st_size > self._nbytes:
                os.ftruncate(self.descriptor, self._nbytes)
        except OSError as error:
            raise disk_error(self.path, error, f"cut it to {format_bytes(self._nbytes)}") from error


def _write_through_cache(descriptor: int, pieces: list[Piece]) -> None:
    for offset, memory in pieces:
        done = 0
        while done < len(memory):
            done += os.pwritev(descriptor, [memory[done:]], offset + done)


def _read_through_cache(descriptor: int, pieces: list[Piece]) -> int:
    """Return the number of bytes read: fewer than asked for where the file ends early."""
    total = 0
    for offset, memory in pieces:
        done = 0
        while done < len(memory):
            count = os.preadv(descriptor, [memory[done:]], offset + done)
            if count == 0:
                return total + done
            done += count
        total += done
    return total

"""A safetensors file as a whole: its header and its tensors in memory, moved between there and the drive in one request."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.memory.aligned import memory_of
from lowmem_pnn.stores.direct_io import REFUSED, Piece, Transfer, open_direct
from lowmem_pnn.stores.disk import IoCounter, disk_error, drop_cache, sync_file
from lowmem_pnn.stores.header import lay_out
from lowmem_pnn.units import format_bytes


class ShardFile:
    """What a file with these tensors consists of, byte for byte.

    Args:
        tensors: all of the file's, contiguous, on the CPU; the image shares their memory.
        metadata: texts for the header.

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
            ((entries[name].offset, memory_of(tensor).data) for name, tensor in tensors.items() if tensor.nbytes),
            key=lambda piece: piece[0],
        )
        self.nbytes = len(self._header) + sum(len(memory) for _, memory in self._tensors)
        # For reading; what is written is the header itself.
        self._found_header = bytearray(len(self._header))
        self._transfer = Transfer([(0, memoryview(self._found_header)), *self._tensors])

    def crc32(self) -> str:
        """The CRC-32 of the file's bytes, as eight hexadecimal digits."""
        value = zlib.crc32(self._header)
        for _, memory in self._tensors:
            value = zlib.crc32(memory, value)
        return f"{value:08x}"

    def write(self, path: Path, counter: IoCounter | None = None) -> NewFile:
        """Make the file: `NewFile.create`, and `write_into`."""
        file = NewFile.create(path, self.nbytes)
        try:
            self.write_into(file, counter)
        except BaseException:
            file.close()
            raise
        return file

    def write_into(self, file: NewFile, counter: IoCounter | None = None) -> None:
        """Fill a new file, past the page cache where the file system lets us; else it is on its way to the drive when this ends.

        Args:
            file: of this image's size.
            counter: counts the bytes written.

        Raises:
            DiskError: the disk is full, or the file system refused.
        """
        pieces: list[Piece] = [(0, memoryview(self._header)), *self._tensors]
        try:
            if not (self._transfer.is_worth_it and file.take(Transfer(pieces))):
                _write_through(file.descriptor, pieces)
                drop_cache(file.descriptor)
        except OSError as error:
            raise disk_error(file.path, error, f"write {format_bytes(self.nbytes)}") from error
        if counter is not None:
            counter.add(written=self.nbytes)

    def read(self, path: Path, counter: IoCounter | None = None, *, direct: bool = False) -> bool:
        """Fill the tensors from a file.

        Args:
            path: of it.
            counter: counts the bytes read.
            direct: past the page cache, if the file system lets us; else through it, and out of it afterwards.

        Returns:
            Whether the file is there and is one with this header, of this size: else tensors may hold anything.

        Raises:
            DiskError: the file system refused.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise disk_error(path, error, "open it") from error
        try:
            if os.fstat(descriptor).st_size != self.nbytes:
                return False
            done = self._read_direct(path) if direct else None
            if done is None:
                done = _read_through(descriptor, [(0, memoryview(self._found_header)), *self._tensors])
                if direct:
                    drop_cache(descriptor)
        except OSError as error:
            raise disk_error(path, error, f"read {format_bytes(self.nbytes)}") from error
        finally:
            os.close(descriptor)
        if counter is not None:
            counter.add(read=done)
        return done == self.nbytes and self._found_header == self._header

    def _read_direct(self, path: Path) -> int | None:
        """The bytes that were there; None if there are no direct transfers."""
        descriptor = open_direct(path, writable=False) if self._transfer.is_worth_it else None
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
    """A file that is not synced yet: it stays open, since only who has it open is sure to be told of a failed write.

    It may be longer than it should be until it is synced or closed: what the last page has too much is cut off only then, since the
    file system may have one wait for that.

    Args:
        path: of it.
        descriptor: open; closed with the file.
        direct: the same, for transfers past the page cache; None where there are none.
        nbytes: that it will have.
    """

    def __init__(self, path: Path, descriptor: int, direct: int | None, nbytes: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._direct = direct
        self._nbytes = nbytes

    @classmethod
    def create(cls, path: Path, nbytes: int) -> NewFile:
        """Make an empty file that will have so many bytes.

        Raises:
            CheckpointError: it is there already.
            DiskError: the file system refused.
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

    def take(self, transfer: Transfer) -> bool:
        """Write past the page cache; whether the file system has such transfers.

        Raises:
            OSError: it has, and refused this one.
        """
        if self._direct is None:
            return False
        try:
            transfer.write(self._direct)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return False
        return True

    def sync(self) -> None:
        """Wait until everything written is on the drive.

        Raises:
            DiskError: it is not, and may never be.
        """
        self._cut()
        sync_file(self.path, self.descriptor)

    def sync_and_close(self) -> None:
        """`sync`, and `close` whatever comes of it.

        Raises:
            DiskError: not everything is on the drive.
        """
        try:
            self.sync()
        finally:
            self.close()

    def close(self) -> None:
        """Close it, without syncing it.

        Raises:
            DiskError: it could not be cut to its size.
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


def _write_through(descriptor: int, pieces: list[Piece]) -> None:
    for offset, memory in pieces:
        done = 0
        while done < len(memory):
            done += os.pwritev(descriptor, [memory[done:]], offset + done)


def _read_through(descriptor: int, pieces: list[Piece]) -> int:
    """The bytes that were there."""
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

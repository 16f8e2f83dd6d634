"""Safetensors file whose tensors are read and written in place, at their offsets.

The format is in `header.py`. The safetensors library reads these files, and its files are read here; but its writer holds a
second copy of the tensors in memory and does not sync, and its readers map the file, or read whole tensors into memory of their own.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from torch import Tensor

from lowmem_pnn.errors import CheckpointError, DiskError
from lowmem_pnn.memory.aligned import ALIGNMENT, PAGE_BYTES, HostAllocator, aligned_empty, byte_view
from lowmem_pnn.stores.direct_io import LEAST_BYTES, REFUSED, is_page_aligned, open_direct
from lowmem_pnn.stores.disk import CHUNK_BYTES, FILE_REMEDY, IoCounter, disk_error, drop_cache, open_regular, sync_file
from lowmem_pnn.stores.header import MAX_HEADER_BYTES, HeaderFault, TensorEntry, TensorLayout, describe, lay_out, parse_header
from lowmem_pnn.units import format_bytes

_MAX_CALL_BYTES = 1 << 30  # Linux moves at most 0x7ffff000 bytes in one call


class TensorFile:
    """Open safetensors file.

    Positions are absolute, so several threads may read and write different tensors (or rows) of one file at once; none may use it
    during or after `close`. Get one from `create` or `open`.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> with TensorFile.create(Path(folder.name) / "x.safetensors", {"x": (torch.float32, (3, 2))}) as file:
        ...     file.write_from("x", torch.ones(2, 2), start=1)
        ...     file.read("x").tolist()
        [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        >>> folder.cleanup()
    """

    path: Path
    entries: dict[str, TensorEntry]
    """The tensors' entries by name, in the header's order (which need not be that of the bytes)."""
    metadata: dict[str, str]
    """Texts in the header."""

    def __init__(
        self,
        path: Path,
        file: io.FileIO,
        entries: dict[str, TensorEntry],
        metadata: dict[str, str],
        counter: IoCounter | None,
        remedy: str,
        direct: bool = False,
    ) -> None:
        self.path = path
        self.entries = entries
        self.metadata = metadata
        self._file = file
        self._counter = counter if counter is not None else IoCounter()
        self._remedy = remedy
        self._bypasses_cache = direct
        try:
            self._direct = open_direct(path, writable=file.writable()) if direct else None
        except OSError as error:
            file.close()
            raise disk_error(path, error, "open it") from error

    @classmethod
    def create(
        cls,
        path: Path,
        tensors: Mapping[str, TensorLayout],
        metadata: Mapping[str, str] | None = None,
        *,
        counter: IoCounter | None = None,
        keep_order: bool = False,
        direct: bool = False,
    ) -> TensorFile:
        """Make a new file with room for tensors, all zero until they are written.

        Nothing is synced, and the room is not reserved on the disk: a full disk shows when tensors are written.

        Args:
            path: Path of the file, which must not exist yet. Its access rights follow the umask.
            tensors: Element type and shape by name; the header lists the tensors in this order.
            metadata: Texts for the header.
            counter: Counts the bytes of every read and write of the file.
            keep_order: Whether the bytes are in the order of `tensors` too, wherever each tensor still starts at a multiple of its
                element's size. Readers that list tensors by offset then show that order; the alignment is not kept.
            direct: Whether large tensors move past the page cache; see `open`.

        Raises:
            CheckpointError: The file is there already, or its header would be too large.
            DiskError: The file system refused.
        """
        path = Path(path)
        try:
            header, entries = lay_out(tensors, metadata or {}, keep_order)
        except HeaderFault as fault:
            raise CheckpointError(f"{str(path)!r} {fault}; use fewer tensors, or shorter names") from None
        size = len(header) + sum(entry.nbytes for entry in entries.values())
        try:
            file = io.FileIO(path, "x+")
        except FileExistsError:
            raise CheckpointError(f"cannot create {str(path)!r}: it exists already; delete it, or use another folder") from None
        except OSError as error:
            raise disk_error(path, error, f"create a file of {format_bytes(size)}") from error
        self = cls(path, file, entries, dict(metadata or {}), counter, FILE_REMEDY, direct)
        try:
            os.ftruncate(file.fileno(), size)
            self._write_bytes(header, 0)
        except (OSError, DiskError) as error:
            self.close()
            with suppress(OSError):
                path.unlink(missing_ok=True)
            if isinstance(error, DiskError):
                raise
            raise disk_error(path, error, f"create a file of {format_bytes(size)}") from error
        return self

    @classmethod
    def open(
        cls,
        path: Path,
        writable: bool = False,
        *,
        counter: IoCounter | None = None,
        remedy: str = FILE_REMEDY,
        direct: bool = False,
    ) -> TensorFile:
        """Open a file and check its header against the format and against the file's size.

        Args:
            path: Path of any safetensors file, of this program or of another.
            writable: Whether tensors may be overwritten.
            counter: Counts the bytes of every read and write of the file.
            remedy: What to do about a damaged file: the end of the error messages.
            direct: Whether large tensors move past the page cache where they fill whole pages, in the file and in memory, and the
                file system lets us; else they move through the cache, which drops the pages at once.

        Raises:
            CheckpointError: There is no such file, or it is not exactly as the format says; the text names the file and the fault.
            DiskError: The file system refused.
        """
        path = Path(path)
        try:
            flags = os.O_RDWR if writable else os.O_RDONLY
            file = io.FileIO(open_regular(path, flags, remedy=remedy, kind="safetensors file"), "r+" if writable else "r")
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{str(path)!r} is missing; {remedy}") from None
        except OSError as error:
            raise disk_error(path, error, "open it") from error
        self = cls(path, file, {}, {}, counter, remedy, direct)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise
        return self

    def read_into(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Fill a tensor from the file. Other threads run meanwhile; autograd does not notice.

        Args:
            name: Name of the tensor in the file.
            tensor: Tensor to fill, contiguous, on the CPU, with the entry's element type: shape (rows, *entry.shape[1:]).
            start: First row to read, on axis 0; 0 for a tensor without axes.

        Raises:
            CheckpointError: The file holds no such tensor or rows, or ends early.
            DiskError: The file system refused.
        """
        offset, view = self._locate(name, tensor, start)
        self._read_bytes(view, offset, name)

    def write_from(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Overwrite a tensor of the file, or rows of it. Other threads run meanwhile.

        Args:
            name: Name of the tensor in the file.
            tensor: Values to write, contiguous, on the CPU, with the entry's element type: shape (rows, *entry.shape[1:]).
            start: First row to write, on axis 0; 0 for a tensor without axes.

        Raises:
            CheckpointError: The file holds no such tensor or rows.
            DiskError: The disk is full, or the file system refused.
        """
        offset, view = self._locate(name, tensor, start)
        self._write_bytes(view, offset)

    def read(self, name: str, allocate: HostAllocator | None = None, elements: slice | None = None) -> Tensor:
        """Read a tensor of the file, or some of its elements, into memory that starts at a multiple of 64 bytes.

        Args:
            name: Name of the tensor in the file.
            allocate: Allocates the tensor that is filled, from shape and element type; None for fresh memory.
            elements: Elements to read, in the order of the file, as a flat tensor; None for the tensor as it is.

        Raises:
            CheckpointError: The file holds no such tensor or elements, or ends early.
        """
        entry = self._entry(name)
        shape = entry.shape if elements is None else (elements.stop - elements.start,)
        if allocate is not None:
            tensor = allocate(shape, entry.dtype)
        else:
            tensor = aligned_empty(shape, entry.dtype, alignment=PAGE_BYTES if self._bypasses_cache else ALIGNMENT)
        if elements is None:
            self.read_into(name, tensor)
        else:
            self._read_bytes(byte_view(tensor).data, self._offset_of(name, tensor, elements.start), name)
        return tensor

    def write_elements(self, name: str, tensor: Tensor, start: int) -> None:
        """Overwrite some elements of a tensor of the file. Other threads run meanwhile.

        Args:
            name: Name of the tensor in the file.
            tensor: Values to write, contiguous, on the CPU, of any shape, with the entry's element type.
            start: First element to write, in the order of the file.

        Raises:
            CheckpointError: The file holds no such tensor or elements.
            DiskError: The disk is full, or the file system refused.
        """
        self._write_bytes(byte_view(tensor).data, self._offset_of(name, tensor, start))

    def copy_from(self, name: str, source: TensorFile, source_name: str) -> None:
        """Copy a tensor from another file, through a buffer of `CHUNK_BYTES`.

        Raises:
            CheckpointError: One of the files holds no such tensor, or the tensors differ in element type or shape.
            DiskError: The disk is full, or the file system refused.
        """
        target, origin = self._entry(name), source._entry(source_name)
        if (target.dtype, target.shape) != (origin.dtype, origin.shape):
            raise CheckpointError(
                f"{str(source.path)!r} holds {source_name!r} as {describe(origin.dtype, origin.shape)}, "
                f"{str(self.path)!r} has room for {describe(target.dtype, target.shape)}; {source._remedy}"
            )
        buffer = memoryview(bytearray(min(CHUNK_BYTES, target.nbytes)))
        for done in range(0, target.nbytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, target.nbytes - done)]
            source._read_bytes(chunk, origin.offset + done, source_name)
            self._write_bytes(chunk, target.offset + done)

    @property
    def size(self) -> int:
        """Size of the file, in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> None:
        """Wait until all bytes written so far are on the drive.

        Raises:
            DiskError: They are not, and may never be: the file must be given up, since a second try can succeed without effect.
        """
        sync_file(self.path, self._file.fileno())

    def drop_cache(self) -> None:
        """Ask the kernel to drop the file's pages from its cache: pages on the drive go, the others are sent to the drive."""
        drop_cache(self._file.fileno())

    def close(self) -> None:
        """Close the file, without syncing it."""
        try:
            self._file.close()
        finally:
            if self._direct is not None:
                os.close(self._direct)
                self._direct = None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise CheckpointError(f"{str(self.path)!r} holds no tensor {name!r}; {self._remedy}")
        return self.entries[name]

    def _locate(self, name: str, tensor: Tensor, start: int) -> tuple[int, memoryview]:
        """Return the offset of some rows in the file, and the tensor's memory."""
        entry = self._entry(name)
        rows = len(tensor) if tensor.dim() else 0
        fits = tensor.dim() == len(entry.shape) and tensor.shape[1:] == entry.shape[1:] and start >= 0
        fits = fits and start + rows <= (entry.shape[0] if entry.shape else 0)
        if not fits or tensor.dtype != entry.dtype:
            raise CheckpointError(
                f"{str(self.path)!r} holds {name!r} as {describe(entry.dtype, entry.shape)}, "
                f"asked for {describe(tensor.dtype, tuple(tensor.shape))} from row {start}; {self._remedy}"
            )
        row_bytes = entry.nbytes // entry.shape[0] if entry.shape and entry.shape[0] else 0
        return entry.offset + start * row_bytes, byte_view(tensor).data

    def _offset_of(self, name: str, tensor: Tensor, start: int) -> int:
        """Return the offset in the file of as many elements as a tensor has, from `start` on."""
        entry = self._entry(name)
        if tensor.dtype != entry.dtype or start < 0 or start + tensor.numel() > math.prod(entry.shape):
            raise CheckpointError(
                f"{str(self.path)!r} holds {name!r} as {describe(entry.dtype, entry.shape)}, "
                f"asked for {tensor.numel()} elements of {tensor.dtype} from element {start}; {self._remedy}"
            )
        return entry.offset + start * tensor.element_size()

    def _read_bytes(self, memory: memoryview, offset: int, name: str) -> None:
        done = 0
        while done < len(memory):
            try:
                count = self._call(os.preadv, memory[done : done + _MAX_CALL_BYTES], offset + done)
            except OSError as error:
                raise disk_error(self.path, error, f"read {format_bytes(len(memory))}") from error
            if count == 0:
                raise CheckpointError(
                    f"{str(self.path)!r} ends at byte {offset + done}, inside {name!r}, which goes to {offset + len(memory)}; "
                    f"{self._remedy}"
                )
            done += count
        self._counter.add(read=done)

    def _write_bytes(self, source: memoryview | bytes, offset: int) -> None:
        source = memoryview(source)
        done = 0
        while done < len(source):
            try:
                done += self._call(os.pwritev, source[done : done + _MAX_CALL_BYTES], offset + done)
            except OSError as error:
                raise disk_error(self.path, error, f"write {format_bytes(len(source))}") from error
        self._counter.add(written=done)

    def _call(self, call: Callable[[int, list[memoryview], int], int], memory: memoryview, offset: int) -> int:
        """Read or write once, past the page cache if that is asked for and possible; return the bytes moved."""
        if not self._bypasses_cache or len(memory) < LEAST_BYTES:
            return call(self._file.fileno(), [memory], offset)
        if self._direct is not None and is_page_aligned(offset, memory):
            try:
                return call(self._direct, [memory], offset)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
        count = call(self._file.fileno(), [memory], offset)
        drop_cache(self._file.fileno(), offset, count)
        return count

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size < 8:
            raise self._fault(f"has {size} bytes, no room for the header's length")
        prefix = bytearray(8)
        self._read_bytes(memoryview(prefix), 0, "the header's length")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise self._fault(f"has a header of {length} bytes, above the limit of {MAX_HEADER_BYTES}")
        if 8 + length > size:
            raise self._fault(f"has {size} bytes, its header alone should end at byte {8 + length}")
        text = bytearray(length)
        self._read_bytes(memoryview(text), 8, "the header")
        try:
            self.entries, self.metadata = parse_header(text, size)
        except HeaderFault as fault:
            raise self._fault(str(fault)) from None

    def _fault(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{str(self.path)!r} {fault}; {self._remedy}")

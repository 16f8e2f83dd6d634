"""A safetensors file whose tensors are read and written in place, at their offsets.

The format is in `header.py`. The safetensors library reads these files, and its files are read here; but its writer holds a
second copy of the tensors in memory and does not sync, and its readers map the file, or read whole tensors into memory of theirs.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.errors import CheckpointError, DiskError
from lowmem_pnn.stores import disk
from lowmem_pnn.stores.disk import CHUNK_BYTES, REMEDY, IoCounter, disk_error, sha256
from lowmem_pnn.stores.header import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    HeaderFault,
    TensorEntry,
    TensorLayout,
    describe,
    lay_out,
    parse,
)
from lowmem_pnn.units import format_bytes

__all__ = ["IoCounter", "TensorEntry", "TensorFile", "TensorLayout", "aligned_empty", "memory_of", "sha256"]

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes an uninitialised host tensor that starts at a multiple of 64 bytes."""

_MAX_CALL_BYTES = 1 << 30  # Linux moves at most 0x7ffff000 bytes in one call


class TensorFile:
    """An open safetensors file.

    Positions are absolute, so several threads may read and write different tensors (or rows) of one file at once; none may use it
    during or after `close`. Get one from `create` or `open`.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> with TensorFile.create(Path(folder.name) / "x.safetensors", {"x": (torch.float32, (3, 2))}) as file:
        ...     file.write_from("x", torch.ones(2, 2), start=1)
        ...     file.read("x").tolist()
        [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        >>> folder.cleanup()
    """

    path: Path
    entries: dict[str, TensorEntry]
    """By name, in the header's order (which need not be that of the bytes)."""
    metadata: dict[str, str]

    def __init__(
        self,
        path: Path,
        file: io.FileIO,
        entries: dict[str, TensorEntry],
        metadata: dict[str, str],
        counter: IoCounter | None,
        remedy: str,
    ) -> None:
        self.path = path
        self.entries = entries
        self.metadata = metadata
        self._file = file
        self._counter = counter if counter is not None else IoCounter()
        self._remedy = remedy

    @classmethod
    def create(
        cls,
        path: Path,
        tensors: Mapping[str, TensorLayout],
        metadata: Mapping[str, str] | None = None,
        *,
        counter: IoCounter | None = None,
        keep_order: bool = False,
    ) -> TensorFile:
        """Make a new file with room for tensors, all zero until they are written.

        Nothing is synced, and the room is not reserved on the disk: a full disk shows when tensors are written.

        Args:
            path: must not exist yet. Its access rights follow the umask.
            tensors: element type and shape by name; the header lists them in this order.
            metadata: texts for the header.
            counter: counts the bytes of every read and write of the file.
            keep_order: store the bytes in the order of `tensors` too, wherever each tensor still starts at a multiple of its
                element's size. Readers that list tensors by offset then show that order; the 64-byte alignment is not kept.

        Raises:
            CheckpointError: the file is there already, or its header would be too large.
            DiskError: the file system refused.
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
        self = cls(path, file, entries, dict(metadata or {}), counter, REMEDY)
        try:
            os.ftruncate(file.fileno(), size)
            self._write_bytes(header, 0)
        except (OSError, DiskError) as error:
            self.close()
            path.unlink(missing_ok=True)
            if isinstance(error, DiskError):
                raise
            raise disk_error(path, error, f"create a file of {format_bytes(size)}") from error
        return self

    @classmethod
    def open(cls, path: Path, writable: bool = False, *, counter: IoCounter | None = None, remedy: str = REMEDY) -> TensorFile:
        """Open a file and check its header against the format and against the file's size.

        Args:
            path: any safetensors file, of this program or of another.
            writable: whether tensors may be overwritten.
            counter: counts the bytes of every read and write of the file.
            remedy: what to do about a damaged file: the end of the error messages.

        Raises:
            CheckpointError: no such file, or not exactly as the format says; the text names the file and the fault.
            DiskError: the file system refused.
        """
        path = Path(path)
        try:
            file = io.FileIO(path, "r+" if writable else "r")
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{str(path)!r} is missing; {remedy}") from None
        except IsADirectoryError:
            raise CheckpointError(f"{str(path)!r} is a folder, not a safetensors file; {remedy}") from None
        except OSError as error:
            raise disk_error(path, error, "open it") from error
        self = cls(path, file, {}, {}, counter, remedy)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise
        return self

    def read_into(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Fill a tensor from the file. Other threads run meanwhile; autograd does not notice.

        Args:
            name: of the tensor in the file.
            tensor: contiguous, on the CPU, with the entry's element type: shape (rows, *entry.shape[1:]).
            start: the first row, on axis 0, of those to read; 0 for a tensor without axes.

        Raises:
            CheckpointError: the file holds no such tensor or rows, or ends early.
            DiskError: the file system refused.
        """
        offset, view = self._locate(name, tensor, start)
        self._read_bytes(view, offset, name)

    def write_from(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Overwrite a tensor of the file, or rows of it. Other threads run meanwhile.

        Args:
            name: of the tensor in the file.
            tensor: contiguous, on the CPU, with the entry's element type: shape (rows, *entry.shape[1:]).
            start: the first row, on axis 0, of those to write; 0 for a tensor without axes.

        Raises:
            CheckpointError: the file holds no such tensor or rows.
            DiskError: the disk is full, or the file system refused.
        """
        offset, view = self._locate(name, tensor, start)
        self._write_bytes(view, offset)

    def read(self, name: str, empty: Empty | None = None) -> Tensor:
        """A tensor of the file, in memory that starts at a multiple of 64 bytes.

        Args:
            name: of the tensor in the file.
            empty: makes the tensor that is filled, from shape and element type; None for `aligned_empty`.

        Raises:
            CheckpointError: the file holds no such tensor, or ends early.
        """
        entry = self._entry(name)
        tensor = (empty or aligned_empty)(entry.shape, entry.dtype)
        self.read_into(name, tensor)
        return tensor

    def copy_from(self, name: str, source: TensorFile, source_name: str) -> None:
        """Copy a tensor from another file, through a buffer of 4 MiB.

        Raises:
            CheckpointError: one of the files holds no such tensor, or theirs differ in element type or shape.
            DiskError: the disk is full, or the file system refused.
        """
        mine, theirs = self._entry(name), source._entry(source_name)
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            raise CheckpointError(
                f"{str(source.path)!r} holds {source_name!r} as {describe(theirs.dtype, theirs.shape)}, "
                f"{str(self.path)!r} has room for {describe(mine.dtype, mine.shape)}; {source._remedy}"
            )
        buffer = memoryview(bytearray(min(CHUNK_BYTES, mine.nbytes)))
        for done in range(0, mine.nbytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, mine.nbytes - done)]
            source._read_bytes(chunk, theirs.offset + done, source_name)
            self._write_bytes(chunk, mine.offset + done)

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def hash_with(self, tensors: Mapping[str, Tensor]) -> str:
        """The SHA-256 of the file once it holds these tensors, in hexadecimal, without reading them back.

        Args:
            tensors: all of the file's, contiguous, on the CPU. Other threads run meanwhile, and may write them.

        Raises:
            CheckpointError: the file holds other tensors.
            DiskError: the file system refused.
        """
        if tensors.keys() != self.entries.keys():
            raise CheckpointError(f"{str(self.path)!r} holds {', '.join(self.entries)}, got {', '.join(tensors)}; {self._remedy}")
        entries = sorted(self.entries.values(), key=lambda entry: (entry.offset, entry.nbytes))
        header = bytearray(entries[0].offset if entries else self.path.stat().st_size)
        self._read_bytes(memoryview(header), 0, "the header")
        digest = hashlib.sha256(header)
        end = len(header)
        for entry in entries:
            _, view = self._locate(entry.name, tensors[entry.name], 0)
            digest.update(bytes(entry.offset - end))  # what alignment leaves free
            digest.update(view)
            end = entry.offset + entry.nbytes
        return digest.hexdigest()

    def sync(self) -> None:
        """Wait until everything written so far is on the drive.

        Raises:
            DiskError: it is not, and may never be: the file must be given up, since a second try can succeed without effect.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(self.path, error, "sync it") from error
        disk.commit_point(f"synced {self.path.name}")

    def drop_cache(self) -> None:
        """Ask the kernel to forget the file's pages: those already on the drive go, the others start on their way to it."""
        if hasattr(os, "posix_fadvise"):
            # Advice only: some file systems do not take it, and nothing depends on it.
            with suppress(OSError):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file, without syncing it."""
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise CheckpointError(f"{str(self.path)!r} holds no tensor {name!r}; {self._remedy}")
        return self.entries[name]

    def _locate(self, name: str, tensor: Tensor, start: int) -> tuple[int, memoryview]:
        """The offset of some rows, and the tensor's memory."""
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
        return entry.offset + start * row_bytes, memory_of(tensor).data

    def _read_bytes(self, target: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._file.fileno(), [target[done : done + _MAX_CALL_BYTES]], offset + done)
            except OSError as error:
                raise disk_error(self.path, error, f"read {format_bytes(len(target))}") from error
            if count == 0:
                raise CheckpointError(
                    f"{str(self.path)!r} ends at byte {offset + done}, inside {what!r}, which goes to {offset + len(target)}; "
                    f"{self._remedy}"
                )
            done += count
        self._counter.add(read=done)

    def _write_bytes(self, source: memoryview | bytes, offset: int) -> None:
        source = memoryview(source)
        done = 0
        while done < len(source):
            try:
                done += os.pwritev(self._file.fileno(), [source[done : done + _MAX_CALL_BYTES]], offset + done)
            except OSError as error:
                raise disk_error(self.path, error, f"write {format_bytes(len(source))}") from error
        self._counter.add(written=done)

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
            self.entries, self.metadata = parse(text, size)
        except HeaderFault as fault:
            raise self._fault(str(fault)) from None

    def _fault(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{str(self.path)!r} {fault}; {self._remedy}")


def aligned_empty(shape: Iterable[int], dtype: torch.dtype, pin: bool = False) -> Tensor:
    """An uninitialised tensor on the CPU that starts at a multiple of 64 bytes.

    The last bits of a matrix product depend on where its operands start, so what is handed to compute always starts like this.

    Args:
        shape: in elements.
        dtype: of the elements.
        pin: page-locked memory, for copies to a GPU that run by themselves.

    Example:
        >>> aligned_empty((2, 3), torch.bfloat16).data_ptr() % 64
        0
    """
    shape = tuple(shape)
    tensor = torch.empty(shape, dtype=dtype, pin_memory=pin)
    if tensor.data_ptr() % ALIGNMENT:
        nbytes = tensor.nbytes
        tensor = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=pin)
        skip = -tensor.data_ptr() % ALIGNMENT
        tensor = tensor[skip : skip + nbytes].view(dtype).view(shape)
    return tensor


def memory_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous tensor on the CPU, shared with it; any element type.

    Example:
        >>> memory_of(torch.tensor([1.0, 2.0], dtype=torch.bfloat16)).tolist()
        [128, 63, 0, 64]
    """
    assert tensor.device.type == "cpu", "only tensors on the CPU are read and written"
    assert tensor.is_contiguous(), "only contiguous tensors are read and written"
    assert not tensor.is_conj(), "a lazily conjugated tensor does not hold its own values"
    assert not tensor.is_neg(), "a lazily negated tensor does not hold its own values"
    view: npt.NDArray[np.uint8] = tensor.detach().view(-1).view(torch.uint8).numpy()
    return view

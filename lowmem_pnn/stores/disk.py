"""Disk access: files opened, read and replaced, byte counts, checksums, syncs, page-cache advice, and errors as one line.

A run's folder may come from somebody else. A pipe in the place of a file would be waited for, and a link in the place of a file that
is written would have another file written: so regular files alone are opened, and to write never through a link.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import stat
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowmem_pnn.errors import CheckpointError, DiskError, LowMemError
from lowmem_pnn.memory.available import available_bytes
from lowmem_pnn.units import MEBIBYTE, format_bytes

CHUNK_BYTES = MEBIBYTE // 4
"""Bytes that are read, hashed or copied at a time."""
FILE_REMEDY = "restore it from a copy, or delete it and run again"
"""What to do about a damaged file, where nothing more is known of it: the end of error messages."""
RUN_REMEDY = "restore the run's folder from a copy, or start again with --overwrite"
"""What to do about a damaged file of a run: the end of error messages."""

MOST_TEXT_BYTES = 64 * MEBIBYTE
"""A larger configuration, journal, index or result is refused: none of ours comes near."""

# Kinds of files that are not opened, and what they are called.
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a link"),
)


# Error numbers of a file system or a drive that refuses; what is not among them is a fault of ours, or no matter of disks.
_REFUSALS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOENT,
        errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.EMLINK, errno.EMFILE,
        errno.ENFILE, errno.EBUSY, errno.ETXTBSY, errno.EXDEV, errno.ENODEV, errno.ENXIO, errno.EOPNOTSUPP, errno.ENOLCK, errno.ETIMEDOUT,
    }
)  # fmt: skip

# Whether all files leave the page cache: `spare_page_cache`.
_is_spared = False


def commit_point(name: str) -> None:
    """Mark that a step of the commit protocol is done. Does nothing: tests replace it by a function that kills the process here.

    Args:
        name: Name of the step.
    """


class IoCounter:
    """Counter of the bytes read from and written to files; safe to share between threads.

    Example:
        >>> counter = IoCounter()
        >>> counter.add(read=10)
        >>> counter.add(written=4)
        >>> counter.bytes_read, counter.bytes_written
        (10, 4)
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self.bytes_written = 0
        self._lock = threading.Lock()

    def add(self, *, read: int = 0, written: int = 0) -> None:
        """Add bytes to the counts."""
        with self._lock:
            self.bytes_read += read
            self.bytes_written += written


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, remedy: str, kind: str = "file") -> int:
    """Open a regular file, and nothing else; a link is followed only to read.

    Args:
        path: Path of the file.
        flags: Flags of `os.open`: how to open it.
        remedy: What to do where something else is there: the end of the message.
        kind: What kind of file is expected, for the message.

    Returns:
        The descriptor; the caller closes it.

    Raises:
        CheckpointError: Something else than a regular file is there, or a link where the file is to be written.
        OSError: The file system refused.
    """
    if flags & (os.O_WRONLY | os.O_RDWR):
        flags |= os.O_NOFOLLOW
    try:
        # Not blocking: a pipe at the other end of which nobody is would be waited for.
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _fault(path, os.lstat(path).st_mode, kind, remedy) from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise _fault(path, mode, kind, remedy)
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(path: str | os.PathLike[str], remedy: str) -> bytes:
    """Read a small regular file as a whole.

    Args:
        path: Path of the file.
        remedy: What to do where something else is there: the end of the message.

    Raises:
        CheckpointError: Something else than a regular file is there, or one above `MOST_TEXT_BYTES`.
        OSError: The file system refused.
    """
    with os.fdopen(open_regular(path, remedy=remedy), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST_TEXT_BYTES:
            raise CheckpointError(f"{str(path)!r} has {format_bytes(size)}, above {format_bytes(MOST_TEXT_BYTES)}; {remedy}")
        return file.read(size)  # not the most that there may be: memory for all of it would be taken first


def refuse_link(path: Path, remedy: str) -> None:
    """Refuse a link in the place of a folder that is written to.

    Args:
        path: Path of the folder, which need not be there.
        remedy: What to do about it: the end of the message.

    Raises:
        CheckpointError: A link is there.
    """
    if path.is_symlink():
        raise CheckpointError(f"{str(path)!r} is a link, and is not written through; {remedy}")


def sha256(path: Path, counter: IoCounter | None = None) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal, read a chunk at a time.

    Raises:
        CheckpointError: There is no such file.
        DiskError: The file system refused.
    """
    digest = hashlib.sha256()
    _read_in_chunks(path, digest.update, counter)
    return digest.hexdigest()


def prefetch_into_page_cache(path: Path, start: int, stop: int) -> None:
    """Ask the kernel to bring a file's bytes into its page cache, which is nobody's private memory.

    This is advice: where the system does not take it, or the file is gone, nothing happens. Asking may take as long as the kernel
    needs to pass the reads on to the drive.

    Args:
        path: Path of the file.
        start: First byte.
        stop: Byte after the last.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError, CheckpointError), io.FileIO(open_regular(path, remedy=FILE_REMEDY), "r") as file:
            os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)


def crc32(path: Path, counter: IoCounter | None = None) -> str:
    """Return the CRC-32 of a file's bytes, as eight hexadecimal digits, read a chunk at a time.

    Raises:
        CheckpointError: There is no such file.
        DiskError: The file system refused.
    """
    value = 0

    def update(chunk: memoryview) -> None:
        nonlocal value
        value = zlib.crc32(chunk, value)

    _read_in_chunks(path, update, counter)
    return f"{value:08x}"


def outgrows_page_cache(nbytes: int) -> bool:
    """Decide whether files that are read once an epoch should leave the page cache at once.

    Files that fit the cache are read from the drive once. Files that do not fit would push each other, and everything else, out
    before they are read again.

    Args:
        nbytes: Bytes of all the files together.

    Example:
        >>> outgrows_page_cache(1), outgrows_page_cache(1 << 60)
        (False, True)
    """
    return _is_spared or nbytes > available_bytes() // 2


def spare_page_cache(spare: bool) -> None:
    """Have all files that are opened from now on leave the page cache, or only those that outgrow it.

    Args:
        spare: for all: where a GPU takes its memory from the host's, which cached files would hold.
    """
    global _is_spared
    _is_spared = spare


def sync_file(path: Path, descriptor: int) -> None:
    """Wait until everything that was written to a file so far is on the drive.

    Args:
        path: Path of the file, for messages.
        descriptor: Descriptor of the file, open since before the writing.

    Raises:
        DiskError: The bytes are not there, and may never be: the file must be given up, since a second try can succeed without
            effect.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise disk_error(path, error, "sync it") from error
    commit_point(f"synced {path.name}")


def drop_cache(descriptor: int, offset: int = 0, nbytes: int = 0) -> None:
    """Ask the kernel to drop a file's pages from its cache: pages that are on the drive go, the others are sent to the drive.

    Args:
        descriptor: Descriptor of the file.
        offset: First byte to drop.
        nbytes: Number of bytes; 0 for all up to the file's end.
    """
    if hasattr(os, "posix_fadvise"):
        # Advice only: some file systems do not take it, and nothing depends on its being taken.
        with suppress(OSError):
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> bool:
    """Wait until the names in a folder (files made, renamed, deleted) are on the drive.

    Returns:
        Whether the file system has such a thing: shared folders of virtual machines have not.

    Raises:
        DiskError: The names are not there.
    """
    can_sync = True
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        can_sync = error.errno not in (errno.EINVAL, errno.EOPNOTSUPP)
        if can_sync:
            raise disk_error(folder, error, "sync it") from error
    commit_point(f"synced {folder.name}")
    return can_sync


def write_durably(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: whatever happens, the file is whole, old or new. A link in its place is replaced, not followed.

    Args:
        path: Path of the file; its folder must exist.
        content: New content; a text is written as UTF-8.

    Raises:
        DiskError: The disk is full or not writable.
    """
    new_path = path.with_name(path.name + ".new")
    try:
        new_path.unlink(missing_ok=True)  # what a process that was killed has left
        with new_path.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        commit_point(f"written {path.name}")
        new_path.replace(path)
        commit_point(f"renamed {path.name}")
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            new_path.unlink(missing_ok=True)
        raise disk_error(path, error, "write it") from error


def remove_folder(path: Path) -> None:
    """Delete a folder with all that is in it, as far as the file system lets us; of a link, the link alone.

    Args:
        path: Path of the folder, which need not be there.
    """
    with suppress(OSError):
        if path.is_symlink() or path.is_file():
            path.unlink()
    with suppress(OSError):  # of a folder that could not be closed Python tells in spite of ignore_errors
        shutil.rmtree(path, ignore_errors=True)


def allow_many_files() -> None:
    """Let the process have as many files open as the system lets it: several for each partition may be open at once."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def disk_error(path: Path, error: OSError, attempt: str) -> DiskError:
    """Make the error to raise where the file system refused something, in one line.

    Args:
        path: File or folder that was worked on.
        error: Error from the file system.
        attempt: What was to be done, such as `write 4.0 MB`.

    Returns:
        The error. Of a full disk it says how much room is left.
    """
    reason = (error.strerror or str(error)).lower()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            state = os.statvfs(path.parent)
            reason += f", {format_bytes(state.f_bavail * state.f_frsize)} are left"
        return DiskError(f"cannot {attempt}: {reason} ({str(path)!r}); make room there, or give a --workdir on another disk")
    return DiskError(f"cannot {attempt}: {reason} ({str(path)!r}); check the disk and its access rights")


def is_refusal(error: OSError) -> bool:
    """Decide whether an error is a file system's or a drive's: not a fault of ours, nor a network's."""
    return error.errno in _REFUSALS


@contextmanager
def file_system_faults(path: Path) -> Iterator[None]:
    """Turn what the file system refuses in this context, and nobody has put into words yet, into a `DiskError`.

    Where a file cannot be read or written, what is done about it (closing, cleaning up) often fails too: the first error is told.

    Args:
        path: Folder that is worked in: the place that the message names where the system names none.

    Raises:
        DiskError: The file system refused something.
    """
    try:
        yield
    except OSError as error:
        before = error.__context__
        while before is not None and not isinstance(before, LowMemError):
            before = before.__context__
        if before is not None:
            raise before from error
        if not is_refusal(error):
            raise
        named = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else path
        raise disk_error(Path(os.fsdecode(named)), error, "go on") from error


def _read_in_chunks(path: Path, process: Callable[[memoryview], None], counter: IoCounter | None) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with io.FileIO(open_regular(path, remedy=FILE_REMEDY), "r") as file:
            while count := file.readinto(buffer):
                process(buffer[:count])
                if counter is not None:
                    counter.add(read=count)
    except FileNotFoundError:
        raise CheckpointError(f"{str(path)!r} is missing; {FILE_REMEDY}") from None
    except OSError as error:
        raise disk_error(Path(path), error, "read it") from error


def _fault(path: str | os.PathLike[str], mode: int, kind: str, remedy: str) -> CheckpointError:
    what = next((name for test, name in _KINDS if test(mode)), "a device")
    return CheckpointError(f"{os.fspath(path)!r} is {what}, not a {kind}; {remedy}")

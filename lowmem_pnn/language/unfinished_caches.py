"""Unfinished token caches: folders that caches are written to before they are renamed; those of processes that were killed are deleted."""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# Folders as `tempfile.mkdtemp` names them, and the lock of each beside it, so that the folder is renamed without it. Over NFS a lock of a
# file counts for all machines, one of a folder for its own alone.
_NAMES = re.compile(r"(\.tokens-[0-9a-f]{24}-[a-z0-9_]{8})(?:\.lock)?")
# An empty one may be one that another process has made just now, and locks next.
_ABANDONED_SECONDS = 600.0


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Make a folder beside the place of a cache, for its files until they are whole; what is left of it at the end is deleted.

    Its lock is held inside the context: what a killed process has left is told by that, and deleted first. A file system without locks
    keeps what was left.

    Args:
        folder: Place of the cache, in a folder that is there.

    Yields:
        The folder.

    Raises:
        OSError: The file system refused.
    """
    _remove_abandoned(folder.parent)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    lock = _lock_of(beside)
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # without locks, nobody can take it for abandoned
                stack.enter_context(_locked(lock))
            yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):
            lock.unlink()


def _remove_abandoned(root: Path) -> None:
    for name in sorted({match[1] for entry in root.iterdir() if (match := _NAMES.fullmatch(entry.name))}):
        folder = root / name
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            continue
        # Locked by a process that writes it, or on a file system without locks: it stays.
        with contextlib.suppress(OSError):
            if _is_new(folder):
                continue
            with _locked(_lock_of(folder)):
                shutil.rmtree(folder, ignore_errors=True)
                _lock_of(folder).unlink()


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _is_new(folder: Path) -> bool:
    is_empty = folder.is_dir() and next(folder.iterdir(), None) is None
    return is_empty and time.time() - folder.stat().st_mtime < _ABANDONED_SECONDS


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Hold a lock, whose file is made where it is not there; raise if another process holds it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)

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

_NAMES = re.compile(r"\.tokens-[0-9a-f]{24}-[a-z0-9_]{8}")  # as `tempfile.mkdtemp` names them
# An empty one may be one that another process has made just now, and locks next.
_ABANDONED_SECONDS = 600.0


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Make a folder beside the place of a cache, for its files until they are whole; what is left of it at the end is deleted.

    It is locked for as long as this process lives: what a killed one has left is told by that, and deleted first.

    Args:
        folder: Place of the cache, in a folder that is there.

    Yields:
        The folder.

    Raises:
        OSError: The file system refused.
    """
    _remove_abandoned(folder.parent)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _locked(beside):
            yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    for folder in root.iterdir():
        if not _NAMES.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        # Locked by a process that writes it, or on a file system without locks: it stays.
        with contextlib.suppress(OSError):
            if next(folder.iterdir(), None) is None and time.time() - folder.stat().st_mtime < _ABANDONED_SECONDS:
                continue
            with _locked(folder):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; raise if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)

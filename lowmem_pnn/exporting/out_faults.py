"""Faults of the place that `--out` names: what the file system refuses there, in one line, and what to do about it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowmem_pnn.errors import DiskError

OUT_REMEDY = "give another --out"
"""What to do about a place that cannot take what is written: the end of error messages."""


@contextmanager
def writing_faults(path: Path) -> Iterator[None]:
    """Say of what the file system refuses in this context that nothing could be written there.

    Args:
        path: path that is written to.

    Raises:
        DiskError: the file system refused something.
    """
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the disk and its access rights"
        raise DiskError(f"cannot write to {path}: {reason}; {remedy}, or {OUT_REMEDY}") from error

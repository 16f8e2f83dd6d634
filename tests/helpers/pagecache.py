"""What of a file is in the page cache, and which transfers went past it."""

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from lowmem_pnn.stores.direct_io import Transfer


def cached_bytes(path: Path) -> int:
    """Of a file, in the page cache: asked by mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        found = np.zeros(-(-len(pages) // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(pages, np.uint8)
        addresses = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(pages)), ctypes.c_void_p(found.ctypes.data)
        failed = ctypes.CDLL(None, use_errno=True).mincore(*addresses)
        del view
        assert not failed, os.strerror(ctypes.get_errno())
    return int((found & 1).sum()) * mmap.PAGESIZE


def watch_transfers(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the direct transfers that succeed from here on, by kind."""
    count = {"read": 0, "write": 0}

    def watched(kind: str) -> None:
        run = getattr(Transfer, kind)

        def counted(self: Transfer, descriptor: int) -> object:
            result = run(self, descriptor)
            count[kind] += 1
            return result

        monkeypatch.setattr(Transfer, kind, counted)

    for kind in count:
        watched(kind)
    return count


def watch_calls(monkeypatch: pytest.MonkeyPatch, *, refuse: bool = False) -> list[int]:
    """Notes the bytes of every direct call of the system that succeeds; or has the system refuse them all."""
    moved: list[int] = []

    def watched(name: str) -> None:
        call = getattr(os, name)

        def noted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                return call(descriptor, buffers, offset)
            if refuse:
                raise OSError(errno.EINVAL, "Invalid argument")
            count = call(descriptor, buffers, offset)
            moved.append(count)
            return count

        monkeypatch.setattr(os, name, noted)

    for name in ("preadv", "pwritev"):
        watched(name)
    return moved

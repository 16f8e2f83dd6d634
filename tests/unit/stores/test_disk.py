"""What the system is told about files."""

import os
import time
from pathlib import Path

import pytest

from lowmem_pnn.stores import disk


def _is_cached(path: Path) -> bool:
    """Whether a file's first page would be read without waiting for the drive."""
    with path.open("rb", buffering=0) as file:
        try:
            return os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux tells what is in its page cache")
def test_advice_about_a_file_brings_its_pages_in(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        if _is_cached(path):
            pytest.skip("this file system keeps its pages")
    except OSError:
        pytest.skip("this file system does not tell")
    disk.prefetch_into_page_cache(path, 0, 1 << 20)
    until = time.monotonic() + 10
    while not _is_cached(path):
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.01)
    disk.prefetch_into_page_cache(tmp_path / "none", 0, 1)  # only advice

"""What the system is told about files."""

import errno
import os
import time
from pathlib import Path

import pytest

from lowmem_pnn.errors import DiskError
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


def test_what_the_file_system_refuses_is_one_line_that_names_the_place(tmp_path: Path) -> None:
    text = r"^cannot go on: input/output error \('.*/run'\); check the disk and its access rights$"
    with pytest.raises(DiskError, match=text), disk.file_system_faults(tmp_path / "run"):
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(DiskError, match=r"'.*/run/weights/p000'"), disk.file_system_faults(tmp_path / "run"):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run/weights/p000"))


class _Unclosable:
    """Context that cannot be left without another error."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")


def test_the_first_error_is_told_where_cleaning_up_fails_too(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"^the first$"), disk.file_system_faults(tmp_path), _Unclosable():
        raise DiskError("the first")


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "Bad file descriptor"), ConnectionRefusedError(111, "refused"), OSError("text")]
)
def test_an_error_that_is_no_file_systems_stays_what_it_is(error: OSError, tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, disk.file_system_faults(tmp_path):  # noqa: PT011 - the very same
        raise error
    assert caught.value is error


def test_a_folder_that_cannot_be_closed_is_removed_as_far_as_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # what Python 3.11 raises in spite of ignore_errors

    monkeypatch.setattr("shutil.rmtree", fail)
    disk.remove_folder(tmp_path)


def test_where_the_device_takes_the_hosts_memory_no_file_stays_in_the_cache() -> None:
    assert not disk.outgrows_page_cache(1)
    disk.spare_page_cache(True)
    try:
        assert disk.outgrows_page_cache(1)
    finally:
        disk.spare_page_cache(False)

"""What several test files use."""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers.commands import write_data
from lowmem_pnn.stores import run_directory


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """One thread for what goes on beside the test's own."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with data.npz; a run directory that is in use is not waited for long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory, "_LOCK_PATIENCE_SECONDS", 0.2)
    write_data(tmp_path / "data.npz")
    return tmp_path


@pytest.fixture(scope="module")
def imports_are_no_garbage() -> Iterator[None]:
    """Every run collects garbage before it takes its floor; looking through all that is imported would take a third of many runs."""
    gc.freeze()
    yield
    gc.unfreeze()

"""What several test files use."""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """One thread for what goes on beside the test's own."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def imports_are_no_garbage() -> Iterator[None]:
    """Every run collects garbage before it takes its floor; looking through all that is imported would take a third of many runs."""
    gc.freeze()
    yield
    gc.unfreeze()

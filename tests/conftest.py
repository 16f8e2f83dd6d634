"""What several test files use."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def imports_are_no_garbage() -> Iterator[None]:
    """Every run collects garbage before it takes its floor; looking through all that is imported would take a third of many runs."""
    gc.freeze()
    yield
    gc.unfreeze()

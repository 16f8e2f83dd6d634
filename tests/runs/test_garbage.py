"""Residencies leave nothing to the garbage collector, so that the memory of a process does not grow between two collections."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowmem_pnn import fit
from lowmem_pnn.engine.residency import Residency

METHODS: dict[str, dict[str, Any]] = {
    "exact": {"epochs": 5},
    "neuroflux": {"epochs": 5, "visits": "interleaved", "macro_batches": 1, "heads": "linear"},
    "pnn": {"epochs": 1, "recovery_epochs": 4, "recover": "all", "kappa": 1.0},
}
FIRST, LAST = 8, 24


@pytest.fixture
def _no_automatic_collection() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what tests have imported is looked through once, here
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.usefixtures("_no_automatic_collection")
@pytest.mark.parametrize("method", METHODS)
def test_residencies_leave_no_garbage(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unload, num_residencies, garbage = Residency.unload, 0, -1

    def counted(self: Residency, **options: bool) -> None:
        nonlocal num_residencies, garbage
        unload(self, **options)
        num_residencies += 1
        if num_residencies == FIRST:
            gc.collect()
        elif num_residencies == LAST:
            garbage = gc.collect()

    monkeypatch.setattr(Residency, "unload", counted)
    fit(
        "mlp:64-32-32-10",
        "digits",
        max_gpu_mem="60MB",
        method=method,
        cuts="1,2",
        batch_size=20,
        train_limit=40,
        commit_every=0.0,
        keep_commits=2,
        workdir=tmp_path / "run",
        device="cpu",
        **METHODS[method],
    )
    assert garbage == 0

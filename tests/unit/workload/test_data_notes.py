"""Notes on data: what is said of samples that are drawn at random."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.datasets import Drawn
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.workload.data_notes import data_notes


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_are_named_where_there_are_none(workers: int) -> None:
    train = from_torch(Drawn([(torch.zeros(3), number % 2) for number in range(4)]))
    workload: Any = SimpleNamespace(
        dataset=SimpleNamespace(notes=(), is_random=True), splits={"train": train}, config=SimpleNamespace(workers=workers)
    )
    (note,) = data_notes(workload)
    assert note.endswith("; they are read between batches, with --workers N beside them" if not workers else "once for all")

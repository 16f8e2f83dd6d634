"""Metrics of a run: the bound on the host's memory."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lowmem_pnn.errors import BudgetError
from lowmem_pnn.run.metrics import Metrics


@pytest.mark.parametrize(("host_tier", "instead"), [(True, ", or --no-host-tier"), (False, "")])
def test_host_memory_above_its_bound_ends_a_run_and_says_what_is_smaller(host_tier: bool, instead: str) -> None:
    session = SimpleNamespace(
        device=SimpleNamespace(host_peak_bytes=1_500_000_000), display=SimpleNamespace(advance=lambda status: None)
    )
    workload = SimpleNamespace(
        config=SimpleNamespace(max_host_mem=2_000_000_000, host_tier=host_tier),
        method=SimpleNamespace(sweeps=True),
        readers_peak_bytes=0,
    )
    state = SimpleNamespace(seconds=0.0, bytes_read=0, bytes_written=0, peak_bytes=0, host_peak_bytes=0)
    metrics = Metrics(*cast(Any, (session, workload, None, (), state)))
    metrics.after_batch("epoch 1")
    workload.readers_peak_bytes = 600_000_000
    with pytest.raises(BudgetError) as found:
        metrics.after_batch("epoch 1")
    assert str(found.value) == (
        "2.10 GB of host memory were in use in epoch 1, above --max-host-mem 2.00 GB; give more, or a smaller --batch-size"
        + instead
    )

"""What a run says that it waited for."""

import time
from pathlib import Path
from typing import Any

import pytest

from lowmem_pnn import fit
from lowmem_pnn.engine.stalls import STALL_KINDS
from lowmem_pnn.sources.splits import SampleSplit


@pytest.mark.parametrize("method", ["pnn", "exact", "neuroflux"])
def test_a_run_says_what_it_waited_for(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = SampleSplit.batch

    def slowly(self: SampleSplit, numbers: Any) -> Any:
        time.sleep(0.02)
        return batch(self, numbers)

    monkeypatch.setattr(SampleSplit, "batch", slowly)
    result = fit(
        "mlp:64-32-32-10",
        "digits",
        max_gpu_mem="200MB",
        method=method,
        cuts="1",
        epochs=2,
        batch_size=64,
        train_limit=640,
        workdir=tmp_path / "run",
        device="cpu",
    )
    first, last = result.partitions[0], result.partitions[-1]
    assert set(first["waited"]) == set(STALL_KINDS)
    assert all(0 <= seconds <= part["seconds"] for part in (first, last) for seconds in part["waited"].values())
    if method != "exact":  # whose batches come before the visits of their partitions
        assert first["waited"]["data"] > 0.1, "10 batches of 20 ms, twice, beside hardly any computing"
        assert last["waited"]["data"] == 0
        assert last["waited"]["disk"] > 0
    assert "waiting for: disk" in str(result)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"waiting": {"disk": ' in text

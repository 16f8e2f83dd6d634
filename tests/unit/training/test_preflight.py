"""The check before training: what it holds against the plan."""

from pathlib import Path

import pytest

import lowmem_pnn
from lowmem_pnn.device import CpuDevice
from lowmem_pnn.training import lifecycle
from lowmem_pnn.training.preflight import Check


def test_freed_memory_is_kept_up_to_what_the_check_itself_is_to_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[Check] = []
    before: list[int] = []

    def expected(device: CpuDevice, peak_bytes: int) -> None:
        if not checks:
            before.append(peak_bytes)

    def check(*arguments: object) -> Check:
        checks.append(preflight(*arguments))  # type: ignore[arg-type]
        return checks[-1]

    preflight = lifecycle.check_tightest
    monkeypatch.setattr(CpuDevice, "set_expected_peak", expected)
    monkeypatch.setattr(lifecycle, "check_tightest", check)
    lowmem_pnn.fit(
        "mlp:64-128-128-10",
        "digits",
        max_gpu_mem="60MB",
        method="exact",
        epochs=1,
        train_limit=32,
        device="cpu",
        workdir=tmp_path / "run",
    )
    assert checks[0].predicted_bytes in before

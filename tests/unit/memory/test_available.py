"""Budgets as shares of what is free."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.memory import available
from lowmem_pnn.memory.available import available_bytes, budget_of, may_be_gpu


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a GPU and with 10 GB free; the folder is that of its control group."""
    monkeypatch.setattr(available, "DRIVERS", ())
    monkeypatch.setattr(available, "_CGROUP", tmp_path)
    monkeypatch.setattr(available.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000_000))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "budget"),
    [("auto", 8_000_000_000), ("75%", 7_500_000_000), (" 12.5 % ", 1_250_000_000), ("2GB", "2GB"), (10**9, 10**9), (None, None)],
)
def test_a_share_becomes_bytes_and_a_size_stays_as_it_is(machine: Path, given: object, budget: object) -> None:
    assert budget_of(given) == budget


def test_a_control_group_may_leave_less_than_the_machine(machine: Path) -> None:
    (machine / "memory.max").write_text("max\n")
    (machine / "memory.current").write_text("1000\n")
    assert available_bytes("cpu") == 10_000_000_000
    (machine / "memory.max").write_text("4000001000\n")
    assert budget_of("50%", "cpu") == 2_000_000_000


@pytest.mark.parametrize("share", ["0%", "101%"])
def test_what_is_no_share_is_refused(share: str) -> None:
    with pytest.raises(ConfigError, match=f"--max-gpu-mem {share} is no share of what is available"):
        budget_of(share)


def test_a_gpu_that_is_asked_for_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds no GPU; give --device cpu"):
        available_bytes("cuda:1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--device cuda:1: found 1 CUDA devices here; give --device cpu"):
        budget_of("auto", "cuda:1")


@pytest.mark.parametrize(
    ("device", "drivers", "may"),
    [("cpu", True, False), ("auto", True, True), ("auto", False, False), ("cuda:1", False, True)],
)
def test_whether_there_may_be_a_gpu_is_told_without_torch(
    device: str, drivers: bool, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "DRIVERS", ("/dev/null",) if drivers else ())
    assert may_be_gpu(device) == may

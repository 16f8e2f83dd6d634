"""Budgets as shares of what is free."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.memory import available
from lowmem_pnn.memory.available import available_bytes, budget_of, may_be_gpu
from lowmem_pnn.memory.cgroup import NO_BOUND


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A machine without a GPU, with 10.5 GB free and a process that has imported nothing; the function sets what its cgroup leaves."""
    monkeypatch.setattr(available, "DRIVERS", ())
    monkeypatch.setattr(available.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_500_000_000))
    monkeypatch.setattr(available, "private_bytes", lambda: 0)
    monkeypatch.setattr(available, "bytes_left", lambda: NO_BOUND)
    return lambda nbytes: monkeypatch.setattr(available, "bytes_left", lambda: nbytes)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("given", "budget"),
    [("auto", 8_000_000_000), ("75%", 7_500_000_000), (" 12.5 % ", 1_250_000_000), ("2GB", "2GB"), (10**9, 10**9), (None, None)],
)
def test_a_share_becomes_bytes_and_a_size_stays_as_it_is(given: object, budget: object) -> None:
    assert budget_of(given) == budget


def test_a_share_is_of_what_is_left_beside_the_process(machine: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_bytes("cpu") == 10_500_000_000
    machine(2_000_000_000)
    assert (available_bytes("cpu"), budget_of("50%", "cpu")) == (2_000_000_000, 750_000_000)
    monkeypatch.setattr(available, "private_bytes", lambda: 3_000_000_000)
    assert budget_of("100%", "cpu") == 2_000_000_000, "of a process that holds it all already"
    monkeypatch.setattr(available, "private_bytes", lambda: 100_000_000)
    machine(300_000_000)
    with pytest.raises(BudgetError, match=r"auto: 300\.0 MB are free, and PyTorch itself takes 500\.0 MB beside the budget"):
        budget_of("auto")


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

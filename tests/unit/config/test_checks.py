"""Checks that need a plan or a device: lists of values per partition, and what has no effect on the CPU."""

import pytest

from lowmem_pnn.config.checks import check_device, check_lengths
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import BudgetError, ConfigError


def make(**options: object) -> FitConfig:
    return configure(**{"max_gpu_mem": "1GB", "model": "mlp:64-10", "data": "digits", **options})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "epochs",
            "1,2,3",
            "--epochs has 3 values, and there are 2 partitions; give one value or 2, or set --cuts or --partitions",
        ),
        (
            "optimizer",
            "sgd,adam,sgd",
            "--optimizer has 3 values, and there are 2 partitions; give one value or 2, or set --cuts or --partitions",
        ),
        (
            "shuffle",
            "yes,no,yes",
            "--shuffle has 3 values, and there are 2 partitions; give one value or 2, or set --cuts or --partitions",
        ),
        ("kappa", "1,2,3", "--kappa has 3 values, and there is 1 boundary; give one value, or set --cuts or --partitions"),
    ],
)
def test_lists_of_another_length_than_the_plan(name: str, value: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_lengths(make(**{name: value}), 2)
    assert str(error.value) == text


def test_lists_that_fit_the_plan() -> None:
    check_lengths(make(epochs="1,2", kappa="3", lr="1,2", optimizer="sgd,adam", shuffle="no,yes"), 2)


def test_what_only_a_gpu_run_reads_is_refused_when_the_device_is_the_cpu_after_all() -> None:
    config = make(budget_scope="allocator")
    check_device(config, on_cpu=False, memory_bytes=10**12)
    with pytest.raises(ConfigError, match="--budget-scope has no effect here: it needs a CUDA device"):
        check_device(config, on_cpu=True, memory_bytes=10**12)


def test_a_budget_above_the_machine_is_refused() -> None:
    with pytest.raises(BudgetError) as error:
        check_device(make(), on_cpu=True, memory_bytes=999_000_000)
    assert str(error.value) == "--max-gpu-mem 1.00 GB is more than this machine has, 999.0 MB; give less"

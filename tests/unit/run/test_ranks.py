"""Ranks: which process of several this is, its folder and its partition; what several cannot share."""

from pathlib import Path
from typing import Any

import pytest

from helpers.commands import lowmem_pnn
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.methods import Sweep, Visit, make_method, visits_of_rank
from lowmem_pnn.run.ranks import ALONE, Rank, rank_folder

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _no_torchrun_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, ALONE),
        ({"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}, Rank(2, 3, 1)),
    ],
)
def test_torchrun_says_which_process_it_is(values: dict[str, str], expected: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert Rank.of_environment() == expected
    assert expected.is_alone == (expected.size == 1)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("RANK", "x", "RANK=x, WORLD_SIZE=1, LOCAL_RANK=0"),
        ("RANK", "-1", "RANK=-1, WORLD_SIZE=1, LOCAL_RANK=0"),
        ("RANK", "5", "RANK=5, WORLD_SIZE=1, LOCAL_RANK=0"),
        ("WORLD_SIZE", "0", "RANK=0, WORLD_SIZE=0, LOCAL_RANK=0"),
        ("WORLD_SIZE", "", "RANK=0, WORLD_SIZE=, LOCAL_RANK=0"),
        ("LOCAL_RANK", "1.5", "RANK=0, WORLD_SIZE=1, LOCAL_RANK=1.5"),
    ],
)
def test_variables_that_are_no_numbers_are_not_torchruns(
    name: str, value: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv(name, value)
    done = lowmem_pnn("fit --max-gpu-mem 100MB")
    assert (done.code, done.fault) == (3, f"the environment has {found}, which are not torchrun's; unset them")


def config(**options: Any) -> FitConfig:
    defaults: dict[str, Any] = {
        "max_gpu_mem": "100MB", "device": "cpu", "model": "mlp:64-32-32-10", "data": "digits", "train_limit": 100, "batch_size": 32,
        "epochs": 2, "parallel_sil": True, "partitions": 3,
    }  # fmt: skip
    return configure(**{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "of", "text"),
    [
        (
            {"parallel_sil": None},
            3,
            "torchrun started 3 processes, and partitions train side by side only with --method pnn --parallel-sil; give that, or start "
            "one process",
        ),
        ({}, 4, "torchrun started 4 processes, and there are 3 partitions; give --partitions 4, or as many --cuts"),
        (
            {"partitions": None},
            2,
            "torchrun started 2 processes, and the planner is to choose the partitions; give --partitions 2, or as many --cuts",
        ),
        (
            {"partitions": None, "cuts": "1"},
            3,
            "torchrun started 3 processes, and there are 2 partitions; give --partitions 3, or as many --cuts",
        ),
    ],
)
def test_what_several_processes_cannot_share_is_refused(options: dict[str, Any], of: int, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        Rank(1, of, 1).check(config(**options))
    assert str(error.value) == text
    ALONE.check(config(**options))


def test_as_many_processes_as_partitions_are_right() -> None:
    Rank(1, 3).check(config())
    Rank(1, 3).check(config(partitions=None, cuts="1,2"))


def test_processes_need_a_folder_that_they_agree_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = lowmem_pnn("fit --max-gpu-mem 100MB --model mlp:64-32-32-10 --data digits --partitions 3 --parallel-sil")
    assert (done.code, done.fault) == (3, "the processes of torchrun need a folder that they agree on; give --workdir DIR")
    assert not list(tmp_path.iterdir())


def test_a_rank_has_a_folder_of_its_own_beside_the_first_ones() -> None:
    workdir = Path("some/run 1.5")
    assert [Rank(number, 3).folder(workdir) for number in range(3)] == [
        workdir, Path("some/run 1.5.rank1"), Path("some/run 1.5.rank2"),
    ]  # fmt: skip
    # A worker that is started again is given its own.
    assert Rank(2, 3).folder(Path("some/run 1.5.rank2")) == Path("some/run 1.5.rank2")
    assert [rank_folder(workdir, number) for number in range(2)] == [workdir, Path("some/run 1.5.rank1")]


def test_a_rank_learns_its_partition_and_the_first_one_does_all_that_follows() -> None:
    program = make_method(config(epochs=(2, 3, 4), recovery_epochs=1)).program(3, ["train", "val"])
    shares = [visits_of_rank(program, rank, 3) for rank in range(3)]
    first, joining, sweep = shares[0]
    assert [first, joining] == [Visit("learn", 0, "train", 2), Visit("join", 0, "train")]
    assert isinstance(sweep, Sweep)
    assert shares[1:] == [
        [Visit("learn", 1, "train", 3, from_synthetic_labels=True)],
        [Visit("learn", 2, "train", 4, from_synthetic_labels=True)],
    ]
    assert visits_of_rank(program, 0, 1) == program

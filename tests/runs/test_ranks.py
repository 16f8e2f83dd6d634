"""Ranks: partitions that train side by side end as in one process, stopped, killed and resumed; what several cannot share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import lowmem_pnn
from helpers.plainloops import stop_at
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import CheckpointError, Stopped
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.process import Process
from lowmem_pnn.run.ranks import Rank, rank_folder
from lowmem_pnn.stores.run_directory import read_journal, seal_journal
from lowmem_pnn.training import start

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _no_torchrun_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


# Which process it is.


def config(**options: Any) -> FitConfig:
    defaults: dict[str, Any] = {
        "max_gpu_mem": "100MB", "device": "cpu", "model": "mlp:64-32-32-10", "data": "digits", "train_limit": 100, "batch_size": 32,
        "epochs": 2, "parallel_sil": True, "partitions": 3,
    }  # fmt: skip
    return configure(**{**defaults, **options})


# Ranks in this process: the last of them is the first one, which then waits for nobody.


def begin_rank(
    number: int, folder: Path, of: int = 3, should_stop: Callable[[], bool] = lambda: False, **options: Any
) -> Result | None:
    rank = Rank(number, of, number)
    return start.begin(config(**options), rank.folder(folder), process=Process(rank=rank, should_stop=should_stop))


def resume(number: int, folder: Path, of: int = 3) -> Result | None:
    rank = Rank(number, of, number)
    return start.resume(rank.folder(folder), process=Process(rank=rank))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


HALF: dict[str, Any] = {
    "model": "helpers.small_networks:Floats", "model_arg": {"num_classes": 10}, "precision": "fp16", "recovery_epochs": 1, "recover": "all",
}  # fmt: skip
MORE: dict[str, Any] = {
    "epochs": (2, 3, 1), "optimizer": ("sgd", "adam", "adamw"), "shuffle": (True, False, True), "kappa": (2.0, 3.0), "sil": "sparse",
    "recovery_epochs": 1, "recover": "all",
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, MORE, {"val_fraction": 0.0}, HALF], ids=["plain", "recovered", "unvalidated", "float16"])
def test_partitions_side_by_side_are_same_as_one_after_the_other(options: dict[str, Any], tmp_path: Path) -> None:
    alone = start.begin(config(**options), tmp_path / "alone")
    assert begin_rank(2, tmp_path / "many", **options) is None
    assert begin_rank(1, tmp_path / "many", **options) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "many.rank1", "many.rank2"]
    # So small a network may need less than what else the process has let go since it took its floor: then that is 0.
    peaks = [
        read_journal(rank_folder(tmp_path / "many", number) / "journal.json")[0]["records"][number]["peak_bytes"]
        for number in (1, 2)
    ]
    result = begin_rank(0, tmp_path / "many", **options)
    assert alone is not None
    assert result is not None
    assert weights(tmp_path / "many") == weights(tmp_path / "alone")
    for name in (
        "train_loss",
        "val_loss",
        "val_accuracy",
        "test_loss",
        "test_accuracy",
        "test_f1",
        "macs",
        "epochs",
        "oom_retries",
        "skipped_steps",
    ):
        assert getattr(result, name) == getattr(alone, name), name
    assert (result.skipped_steps > 0) == (options is HALF)
    assert all(part["peak_bytes"] >= peak for part, peak in zip(result.partitions[1:], peaks, strict=True)), "of every rank"
    assert result.peak_bytes >= max(part["peak_bytes"] for part in result.partitions)
    # The other ranks' folders are gone.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "many"]
    again = start.resume(tmp_path / "many")
    assert again is not None
    assert again.to_json() == result.to_json()


def test_ranks_that_were_stopped_and_resumed_are_same_as_uninterrupted(tmp_path: Path) -> None:
    alone = start.begin(config(**MORE), tmp_path / "alone")
    assert alone is not None
    options = {**MORE, "commit_every": 0.0}
    for number, batch in ((1, 4), (2, 2)):
        with pytest.raises(Stopped):
            begin_rank(number, tmp_path / "many", should_stop=stop_at(batch), **options)
    with pytest.raises(Stopped):
        begin_rank(0, tmp_path / "many", should_stop=stop_at(3), **options)
    assert [resume(number, tmp_path / "many") for number in (1, 2)] == [None, None]
    # A rank that is done has nothing left to do.
    assert resume(1, tmp_path / "many") is None
    result = resume(0, tmp_path / "many")
    assert result is not None
    assert result.resumed == 1
    assert (result.train_loss, result.val_loss, result.macs) == (alone.train_loss, alone.val_loss, alone.macs)
    assert weights(tmp_path / "many") == weights(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "many"]


def test_the_first_rank_can_be_stopped_while_it_waits_and_when_it_has_joined(tmp_path: Path) -> None:
    assert start.begin(config(**MORE), tmp_path / "alone") is not None
    options = {**MORE, "commit_every": 0.0}
    assert begin_rank(2, tmp_path / "many", **options) is None
    # It is asked 6 times while it learns, then whenever it looks for partition 2 in vain.
    with pytest.raises(Stopped):
        begin_rank(0, tmp_path / "many", should_stop=stop_at(9), **options)
    journal = read_journal(tmp_path / "many" / "journal.json")[0]
    assert (journal["visit"], journal["progress"]["epoch"]) == (1, 0)
    assert begin_rank(1, tmp_path / "many", **options) is None
    rank = Rank(0, 3)
    with pytest.raises(Stopped):
        start.resume(tmp_path / "many", process=Process(rank=rank, should_stop=stop_at(1)))
    assert read_journal(tmp_path / "many" / "journal.json")[0]["visit"] == 2
    assert start.resume(tmp_path / "many", process=Process(rank=rank)) is not None
    assert weights(tmp_path / "many") == weights(tmp_path / "alone")


# What is not one run.


@pytest.fixture
def one_done(tmp_path: Path) -> Path:
    """The folder of a run of which the second rank is trained."""
    assert begin_rank(1, tmp_path / "run") is None
    return tmp_path / "run"


def join(folder: Path, **options: Any) -> None:
    """Run the first rank, which gives up if it is not refused: the third one never comes."""
    begin_rank(0, folder, should_stop=stop_at(60), **options)


def test_a_rank_of_another_configuration_is_not_joined(one_done: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        join(one_done, lr=0.5)
    assert str(error.value) == (
        f"the run in {one_done}.rank1 is not of this one: another configuration, or other data; begin again with --overwrite"
    )
    assert not (one_done / "model.safetensors").exists()
    assert rank_folder(one_done, 1).exists()


def test_a_rank_that_cut_the_model_otherwise_is_not_joined(one_done: Path) -> None:
    path = rank_folder(one_done, 1) / "journal.json"
    body, digest = read_journal(path)
    body["plan"]["partitions"][1]["stop"] += 1
    body["plan"]["partitions"][2]["start"] += 1
    body["plan"]["partitions"][2]["stop"] += 1
    path.write_text(seal_journal(body, digest))
    with pytest.raises(CheckpointError) as error:
        join(one_done)
    assert str(error.value) == (
        f"the ranks cut the model differently, since less memory was free for one: {one_done} before layers [1, 2], "
        f"{one_done}.rank1 before layers [1, 3]; begin again with --overwrite and --cuts"
    )


def test_a_rank_whose_weights_were_damaged_is_not_joined(one_done: Path) -> None:
    path = sorted((rank_folder(one_done, 1) / "weights").glob("p001.*"))[-1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="has sha256"):
        join(one_done)


def test_a_ranks_run_goes_on_as_that_rank_alone(one_done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped):
        begin_rank(0, one_done, should_stop=stop_at(1))
    for folder, rank in ((one_done, 0), (rank_folder(one_done, 1), 1)):
        done = lowmem_pnn("fit", "--resume", "--workdir", folder)
        assert done.code == 6
        assert done.fault == (
            f"the run in {folder} is process {rank + 1} of 3, and this is 1 of 1; resume it by torchrun with 3 processes"
        )
    # Nor is a run of one process taken over by several.
    with pytest.raises(Stopped):
        start.begin(config(), one_done / "alone", process=Process(should_stop=stop_at(1)))
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = lowmem_pnn("fit", "--resume", "--workdir", one_done / "alone")
    assert (done.code, done.fault) == (
        6, f"the run in {one_done}/alone is process 1 of 1, and this is 1 of 3; resume it without torchrun",
    )  # fmt: skip

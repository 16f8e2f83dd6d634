"""Ranks: partitions that train side by side end as in one process, stopped, killed and resumed; what several cannot share."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from helpers.commands import lowmem_pnn, write_data
from helpers.plainloops import stop_at
from lowmem_pnn.api import resume_run, start_run
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import CheckpointError, ConfigError, Stopped
from lowmem_pnn.methods import Sweep, Visit, make_method, visits_of_rank
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.ranks import ALONE, Rank, rank_folder
from lowmem_pnn.stores.run_directory import read_journal, seal_journal

pytestmark = pytest.mark.usefixtures("imports_are_no_garbage")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _no_torchrun_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


# Which process it is.


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
    assert expected.is_alone == (expected.of == 1)


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


# Ranks in this process: the last of them is the first one, which then waits for nobody.


def start(
    number: int, folder: Path, of: int = 3, should_stop: Callable[[], bool] = lambda: False, **options: Any
) -> Result | None:
    rank = Rank(number, of, number)
    return start_run(config(**options), rank.folder(folder), rank=rank, should_stop=should_stop)


def resume(number: int, folder: Path, of: int = 3) -> Result | None:
    rank = Rank(number, of, number)
    return resume_run(rank.folder(folder), rank=rank)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


class Floats(nn.Module):
    """Float32 crosses its cuts, whatever it computes in; gradients overflow in float16 until the loss's scale is small."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu().float() * 64
        x = self.second(x).relu().float() * 64
        scores: Tensor = self.last(x) / 64
        return scores


HALF: dict[str, Any] = {
    "model": "test_ranks:Floats", "model_arg": {"num_classes": 10}, "precision": "fp16", "recovery_epochs": 1, "recover": "all",
}  # fmt: skip
MORE: dict[str, Any] = {
    "epochs": (2, 3, 1), "optimizer": ("sgd", "adam", "adamw"), "shuffle": (True, False, True), "kappa": (2.0, 3.0), "sil": "sparse",
    "recovery_epochs": 1, "recover": "all",
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, MORE, {"val_fraction": 0.0}, HALF], ids=["plain", "recovered", "unvalidated", "float16"])
def test_partitions_side_by_side_are_same_as_one_after_the_other(options: dict[str, Any], tmp_path: Path) -> None:
    alone = start_run(config(**options), tmp_path / "alone")
    assert start(2, tmp_path / "many", **options) is None
    assert start(1, tmp_path / "many", **options) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "many.rank1", "many.rank2"]
    result = start(0, tmp_path / "many", **options)
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
    assert all(part["peak_bytes"] > 0 for part in result.partitions), "of every rank"
    assert result.peak_bytes >= max(part["peak_bytes"] for part in result.partitions)
    # The other ranks' folders are gone.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "many"]
    again = resume_run(tmp_path / "many")
    assert again is not None
    assert again.to_json() == result.to_json()


def test_ranks_that_were_stopped_and_resumed_are_same_as_uninterrupted(tmp_path: Path) -> None:
    alone = start_run(config(**MORE), tmp_path / "alone")
    assert alone is not None
    options = {**MORE, "commit_every": 0.0}
    for number, batch in ((1, 4), (2, 2)):
        with pytest.raises(Stopped):
            start(number, tmp_path / "many", should_stop=stop_at(batch), **options)
    with pytest.raises(Stopped):
        start(0, tmp_path / "many", should_stop=stop_at(3), **options)
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
    assert start_run(config(**MORE), tmp_path / "alone") is not None
    options = {**MORE, "commit_every": 0.0}
    assert start(2, tmp_path / "many", **options) is None
    # It is asked 6 times while it learns, then whenever it looks for partition 2 in vain.
    with pytest.raises(Stopped):
        start(0, tmp_path / "many", should_stop=stop_at(9), **options)
    journal = read_journal(tmp_path / "many" / "journal.json")[0]
    assert (journal["visit"], journal["progress"]["epoch"]) == (1, 0)
    assert start(1, tmp_path / "many", **options) is None
    rank = Rank(0, 3)
    with pytest.raises(Stopped):
        resume_run(tmp_path / "many", rank=rank, should_stop=stop_at(1))
    assert read_journal(tmp_path / "many" / "journal.json")[0]["visit"] == 2
    assert resume_run(tmp_path / "many", rank=rank) is not None
    assert weights(tmp_path / "many") == weights(tmp_path / "alone")


# What is not one run.


@pytest.fixture
def one_done(tmp_path: Path) -> Path:
    """The folder of a run of which the second rank is trained."""
    assert start(1, tmp_path / "run") is None
    return tmp_path / "run"


def join(folder: Path, **options: Any) -> None:
    """Run the first rank, which gives up if it is not refused: the third one never comes."""
    start(0, folder, should_stop=stop_at(60), **options)


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
    body["plan"]["partitions"][1]["start"] += 1
    path.write_text(seal_journal(body, digest))
    with pytest.raises(CheckpointError) as error:
        join(one_done)
    assert str(error.value) == (
        f"the ranks cut the model differently, since less memory was free for one: {one_done} before layers [1, 2], "
        f"{one_done}.rank1 before layers [2, 2]; begin again with --overwrite and --cuts"
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
        start(0, one_done, should_stop=stop_at(1))
    for folder, rank in ((one_done, 0), (rank_folder(one_done, 1), 1)):
        done = lowmem_pnn("fit", "--resume", "--workdir", folder)
        assert done.code == 6
        assert done.fault == (
            f"the run in {folder} is process {rank + 1} of 3, and this is 1 of 1; resume it by torchrun with 3 processes"
        )
    # Nor is a run of one process taken over by several.
    with pytest.raises(Stopped):
        start_run(config(), one_done / "alone", should_stop=stop_at(1))
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = lowmem_pnn("fit", "--resume", "--workdir", one_done / "alone")
    assert (done.code, done.fault) == (
        6, f"the run in {one_done}/alone is process 1 of 1, and this is 1 of 3; resume it without torchrun",
    )  # fmt: skip


# Under torchrun itself.

# A model that a file beside it makes slow.
_SLOW = """
import time
from pathlib import Path
import torch

SLOW = Path(__file__).with_name("slow")

class Slow(torch.nn.Module):
    def forward(self, x):
        if len(x) and type(x) is torch.Tensor and x.device.type == "cpu" and SLOW.exists():
            time.sleep(0.15)
        return x

def build():
    layers = [torch.nn.Linear(20, 16), Slow(), torch.nn.Linear(16, 16), Slow(), torch.nn.Linear(16, 3), Slow()]
    return torch.nn.Sequential(*layers)
"""
_FIT = (
    "fit --max-gpu-mem 100MB --device cpu --model it.py:build --data npz:data.npz --epochs 3 --cuts 1,2 --parallel-sil --batch-size 16 "
    "--commit-every 0"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the run of one process."""
    place = tmp_path_factory.mktemp("whole")
    write(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert lowmem_pnn(f"{_FIT} --workdir run --quiet").code == 0
    return weights(place / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def write(folder: Path) -> None:
    write_data(folder / "data.npz")
    (folder / "it.py").write_text(_SLOW)


class Torchrun:
    """`torchrun --nproc-per-node 3 -m lowmem_pnn ARGUMENTS`."""

    def __init__(self, folder: Path, arguments: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "lowmem_pnn"]
        self.process = subprocess.Popen(
            [*command, *arguments.split()],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Wait for it; its exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@pytest.fixture
def torchrun(folder: Path) -> Iterator[Callable[[str], Torchrun]]:
    """Starts torchrun; what still runs at the end is ended, so that a test that fails leaves nothing behind."""
    started: list[Torchrun] = []

    def run(arguments: str) -> Torchrun:
        started.append(Torchrun(folder, arguments))
        return started[-1]

    yield run
    for each in started:
        if each.process.poll() is None:
            each.process.terminate()
            each.process.communicate(timeout=60)


def wait_for(happens: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not happens():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def journal(folder: Path) -> dict[str, Any]:
    return read_journal(folder / "journal.json")[0]


def commits(folder: Path) -> int:
    return int(journal(folder)["number"]) if (folder / "journal.json").exists() else 0


def test_torchrun_gives_the_bits_of_one_process_and_one_result(
    folder: Path, torchrun: Callable[[str], Torchrun], whole: bytes
) -> None:
    code, out, err = torchrun(f"{_FIT} --workdir run --json --quiet").end()
    assert code == 0, err
    assert json.loads(out) == json.loads((folder / "run" / "result.json").read_text())
    assert weights(folder / "run") == whole
    assert sorted(path.name for path in folder.iterdir() if path.is_dir() and "pycache" not in path.name) == ["run"]


@pytest.mark.slow
def test_torchrun_that_was_stopped_is_resumed_and_a_rank_that_is_killed_goes_on(
    folder: Path, torchrun: Callable[[str], Torchrun], whole: bytes
) -> None:
    ranks = [rank_folder(folder / "run", number) for number in range(3)]
    (folder / "slow").touch()
    stopped = torchrun(f"{_FIT} --workdir run")
    wait_for(lambda: min(map(commits, ranks)) > 2, stopped.process)
    stopped.process.send_signal(signal.SIGTERM)
    code, out, err = stopped.end()
    assert (code != 0, out) == (True, "")
    assert err.count("lowmem-pnn: stopped; lowmem-pnn fit --resume --workdir run") == 3
    assert {journal(rank)["stage"] for rank in ranks} == {"training"}
    before = [commits(rank) for rank in ranks]

    resumed = torchrun("fit --resume --workdir run --json --quiet")
    wait_for(lambda: commits(ranks[2]) > before[2] + 2, resumed.process)
    os.kill(int((ranks[2] / "lock").read_text()), signal.SIGKILL)
    (folder / "slow").unlink()
    code, out, err = resumed.end()
    assert code == 0, err
    assert "lowmem-pnn: the worker died of SIGKILL; going on from the last commit" in err
    assert json.loads(out)["resumed"] == 1
    assert weights(folder / "run") == whole
    assert not [rank for rank in ranks[1:] if rank.exists()]

"""Unfinished runs that somebody has changed: sealed nonsense is refused, older commits are gone back to, names lead nowhere else."""

import hashlib
import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import lowmem_pnn, write_data
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import Stopped
from lowmem_pnn.run.process import Process
from lowmem_pnn.stores.disk import write_durably
from lowmem_pnn.stores.journal import read_journal, seal_journal
from lowmem_pnn.training import start

RESUME = "fit --resume --workdir run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two partitions that was stopped in the second, its last three commits kept, and one that was not."""
    folder = tmp_path_factory.mktemp("stopped")
    write_data(folder / "data.npz")
    config = configure(
        max_gpu_mem="100MB", device="cpu", model="mlp:20-16-3", data=f"npz:{folder}/data.npz", cuts="1", epochs=2, batch_size=32,
        commit_every=0.0, keep_commits=3,
    )  # fmt: skip
    asked = itertools.count()
    with pytest.raises(Stopped):
        start.begin(config, folder / "run", process=Process(should_stop=lambda: next(asked) >= 16))
    start.begin(config, folder / "whole")
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert read_journal(Path("run/journal.json"))[0]["activations"], "it is in the second partition"
    return Path("run")


def change(path: Path, **changes: Any) -> None:
    body, config = read_journal(path)
    write_durably(path, seal_journal({**body, **changes}, config))


def older(run: Path) -> list[Path]:
    return sorted(run.glob("journal.0*.json"))


def _layers(last: int) -> Any:
    def changed(body: dict[str, Any]) -> dict[str, Any]:
        first, second = body["plan"]["partitions"]
        return {"plan": {**body["plan"], "partitions": [first, {**second, "stop": last}]}}

    return changed


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (lambda body: {"records": []}, "0 records for 2 partitions"),
        (lambda body: {"visit": 99}, "visit 99, where the program has"),
        (lambda body: {"progress": {"epoch": 99}}, "epoch 99, batch 0, where visit"),
        (lambda body: {"progress": {"batch": 99}}, "batch 99, where visit"),
        (_layers(3), "a plan of 3 layers, where the model has 2"),
        (lambda body: {"activations": {}}, "names no train samples at the boundary before partition 2"),
        (lambda body: {"activations": {**body["activations"], "train": "b02-train"}}, "activations/b02-train"),
        (lambda body: {"activations": {"x": "../../victim"}}, "a name of activations that is none of ours"),
        (
            lambda body: {"weights": {**body["weights"], "partitions": body["weights"]["partitions"][::-1]}},
            "the journal names 'p001",
        ),
        (lambda body: {"stage": "trained", "visit": 99, "rank": 1}, "rank 1 of 1"),
    ],
)
def test_sealed_nonsense_is_the_checkpoints_fault(run: Path, changes: Any, text: str) -> None:
    Path("victim").mkdir()
    change(run / "journal.json", **changes(read_journal(run / "journal.json")[0]))
    done = lowmem_pnn(RESUME)
    assert (done.code, text in done.fault) == (6, True), done.err
    assert Path("victim").is_dir()
    assert not (run / "result.json").exists()


def test_older_commits_that_name_other_folders_delete_nothing(run: Path) -> None:
    Path("victim").mkdir()
    names = [path.name for path in older(run)]
    change(older(run)[0], activations={"train": "../../victim"})
    change(older(run)[1], weights={"format": 1, "partitions": [{"file": "../../victim"}], "rest": 3})
    assert len(names) == 2
    assert lowmem_pnn(RESUME).code == 0
    assert Path("victim").is_dir()


def test_a_damaged_older_commit_is_said_and_left_alone(run: Path) -> None:
    damaged = older(run)[0]
    damaged.write_text("cut sho")
    (run / "journal.backup.json").write_text("mine")
    done = lowmem_pnn(RESUME)
    assert done.code == 0, done.err
    assert f"{damaged} is no whole commit of this run, and is left alone; going on from run/journal.json" in done.err
    assert (run / "model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert (damaged.read_text(), (run / "journal.backup.json").read_text()) == ("cut sho", "mine")
    assert older(run) == [damaged]


@pytest.mark.parametrize("damage", ["journal", "weights"])
def test_a_damaged_last_commit_says_the_command_that_goes_on_from_the_one_before(run: Path, damage: str) -> None:
    named = [entry["file"] for entry in read_journal(older(run)[-1])[0]["weights"]["partitions"]]
    if damage == "journal":
        (run / "journal.json").write_text("cut sho")
    else:
        newest = read_journal(run / "journal.json")[0]["weights"]["partitions"]
        (file,) = [entry["file"] for entry in newest if entry["file"] not in named]
        content = bytearray((run / "weights" / file).read_bytes())
        content[-5] ^= 1
        (run / "weights" / file).write_bytes(content)
    done = lowmem_pnn(RESUME)
    assert done.code == 6
    before, command = done.fault.split("; or go back to the commit before: ")
    assert "journal.json" in before if damage == "journal" else file in before
    copy, resume = command.split(" && ")
    subprocess.run(copy.split(), check=True)
    assert lowmem_pnn(resume.removeprefix("lowmem-pnn ")).code == 0
    assert (run / "model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


@pytest.mark.parametrize("place", ["index.json", "00000.safetensors", "weights"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(run: Path, place: str) -> None:
    import os

    store = next((run / "activations").iterdir())
    path = sorted((run / "weights").iterdir())[0] if place == "weights" else store / place
    path.unlink()
    os.mkfifo(path)
    done = lowmem_pnn(RESUME)
    assert (done.code, f"{path.name}' is a pipe, not a" in done.fault) == (6, True), done.err


def test_links_among_the_activations_are_not_followed(run: Path) -> None:
    victim = Path("victim")
    (victim / "b01-test-measured").mkdir(parents=True)
    (victim / "index.json").write_text("mine")
    (run / "activations" / "b01-test-measured").symlink_to("../../victim")
    assert lowmem_pnn(RESUME).code == 0
    assert (victim / "index.json").read_text() == "mine"


def test_what_no_commit_names_is_deleted_at_a_resume(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "activations/b01-test").mkdir()
    (run / "activations/mine").mkdir()

    class Enough(Exception):
        pass

    def stop(*_: object) -> None:
        raise Enough

    monkeypatch.setattr("lowmem_pnn.training.lifecycle.carry_out", stop)
    with pytest.raises(Enough):
        start.resume(run)
    assert not (run / "activations/b01-test").exists()
    assert (run / "activations/mine").exists()


def test_a_configuration_of_other_values_than_partitions_is_refused(run: Path) -> None:
    content = json.dumps({**json.loads((run / "config.json").read_text()), "epochs": [2, 2, 2], "cuts": None})
    (run / "config.json").write_text(content)
    body, _ = read_journal(run / "journal.json")
    (run / "journal.json").write_text(seal_journal(body, hashlib.sha256(content.encode()).hexdigest()))
    done = lowmem_pnn(RESUME)
    assert (done.code, "2 partitions, where --epochs has 3 values" in done.fault) == (6, True), done.err

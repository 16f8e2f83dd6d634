"""Finished runs: damaged files are refused by name, exports replace nothing but exports, and reading needs no writing."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowmem_pnn as package
from helpers.commands import lowmem_pnn, train, write_data
from lowmem_pnn.errors import CheckpointError, DiskError
from lowmem_pnn.run.state import LEFT_FILES
from lowmem_pnn.stores import run_creation, run_directory
from lowmem_pnn.stores.disk import write_durably
from lowmem_pnn.stores.journal import read_journal, seal_journal


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a run of two exits that is done."""
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = train("--method neuroflux --heads linear")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run in the working directory, named as by the command line."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_creation, "_LOCK_PATIENCE_SECONDS", 0.2)
    return Path("run")


def change_journal(run: Path, **changes: Any) -> None:
    body, config = read_journal(run / "journal.json")
    write_durably(run / "journal.json", seal_journal({**body, **changes}, config))


def _flip(path: Path, place: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _without_first(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)


def _renamed(path: Path) -> None:
    save_file({f"other.{name}": tensor for name, tensor in load_file(path).items()}, path)


def _transposed(path: Path) -> None:
    save_file({name: tensor.flatten()[:-1].clone() for name, tensor in load_file(path).items()}, path)


DAMAGES = {
    "flipped": _flip,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 5),
    "missing tensor": _without_first,
    "other names": _renamed,
    "other shapes": _transposed,
    "missing": Path.unlink,
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
OF_TENSORS = ("missing tensor", "other names", "other shapes")
COMMANDS = ("evaluate run", "export run --exit 1 --out there", "fit --resume --workdir run")


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in LEFT_FILES for damage in DAMAGES if name != "result.json" or damage not in OF_TENSORS],
)
def test_a_file_that_is_not_as_the_run_left_it_is_refused_by_all_that_read_it(run: Path, name: str, damage: str) -> None:
    DAMAGES[damage](run / name)
    for command in COMMANDS:
        done = lowmem_pnn(command)
        assert (done.code, f"run/{name}" in done.fault) == (6, True), done.err
    assert not Path("there").exists()


@pytest.mark.parametrize("damage", ["zeros", "cut", "missing tensor", "other names", "other shapes"])
def test_weights_of_a_run_of_an_earlier_version_are_held_against_the_model(run: Path, damage: str) -> None:
    change_journal(run, files={})
    DAMAGES[damage](run / "model.safetensors")
    for command in ("evaluate run", "export run --exit 2 --out elsewhere"):
        done = lowmem_pnn(command)
        assert done.code == 6, done.err
        assert "run" in done.fault
    assert not Path("elsewhere").exists()


def test_a_result_of_an_earlier_version_that_lacks_a_part_is_refused(run: Path) -> None:
    change_journal(run, files={})
    for command in COMMANDS:
        assert lowmem_pnn(command).code == 0
    result = json.loads((run / "result.json").read_text())
    for changes in ({"partitions": [{}]}, {"exits": 3}, {"chosen_exit": 99}, {"seconds": "x"}):
        (run / "result.json").write_text(json.dumps({**result, **changes}))
        for command in COMMANDS:
            done = lowmem_pnn(command)
            assert (done.code, "run/result.json" in done.fault) == (6, True), done.err


# Export.


def test_an_export_is_done_again_into_its_folder(run: Path) -> None:
    for exit in (1, 2, 1):
        done = lowmem_pnn(f"export run --exit {exit} --out there --json")
        assert done.code == 0, done.err
        assert sorted(path.name for path in Path("there").iterdir()) == ["export.json", "model.pt2", "model.safetensors"]
        program = torch.export.load("there/model.pt2").module()
        state = {name: tensor.clone() for name, tensor in program.state_dict().items()}
        saved = load_file("there/model.safetensors")
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name], saved[name]) for name in saved)
    weights = load_file(run / "model.safetensors")
    assert torch.equal(saved["body.0.0.weight"], weights["0.weight"])


def test_an_export_never_replaces_the_weights_of_a_run(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    Path("link").symlink_to("run")
    for out in ("run", "link", "run/../run", "run/weights", "run/activations/x"):
        done = lowmem_pnn(f"export run --exit 1 --out {out}")
        assert (done.code, "give --out run/exit-1" in done.fault) == (3, True), done.err
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt2", "export.json"])
def test_an_export_replaces_no_file_of_anybody_else(run: Path, name: str) -> None:
    folder = Path("there")
    folder.mkdir()
    (folder / name).write_text("mine")
    done = lowmem_pnn("export run --exit 1 --out there")
    assert (done.code, done.fault) == (
        3, f"there/{name} is there, and no export of this program has left it so; give another --out",
    ), done.err  # fmt: skip
    (folder / name).unlink()
    (folder / "notes.txt").write_text("mine")
    assert lowmem_pnn("export run --exit 1 --out there").code == 0
    (folder / name).write_text("mine")
    if name == "export.json":
        assert lowmem_pnn("export run --exit 1 --out there").code == 3
    else:
        assert f"there/{name} is there" in lowmem_pnn("export run --exit 1 --out there").fault
    assert ((folder / name).read_text(), (folder / "notes.txt").read_text()) == ("mine", "mine")


def test_an_export_does_not_write_through_links(run: Path) -> None:
    Path("victim").mkdir()
    Path("victim/model.pt2").write_text("mine")
    (run / "exit-1").symlink_to("../victim")
    assert "is a link" in lowmem_pnn("export run --exit 1").fault
    (run / "exit-1").unlink()
    (run / "exit-1").mkdir()
    (run / "exit-1/model.pt2").symlink_to("../../victim/model.pt2")
    done = lowmem_pnn("export run --exit 1")
    assert (done.code, "run/exit-1/model.pt2 is there" in done.fault) == (3, True), done.err
    assert Path("victim/model.pt2").read_text() == "mine"


def test_an_export_on_a_full_disk_leaves_nothing_half_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lowmem_pnn.exporting.export_folder as export_folder

    assert lowmem_pnn("export run --exit 1 --out there").code == 0
    before = {path.name: path.read_bytes() for path in Path("there").iterdir()}

    class Full(export_folder.HashedFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            with open("/dev/full", "wb") as full:  # noqa: PTH123
                os.dup2(full.fileno(), self.fileno())

    monkeypatch.setattr(export_folder, "HashedFile", Full)
    for out in ("there", "new"):
        done = lowmem_pnn(f"export run --exit 2 --out {out}")
        assert done.code == 5, done.err
        assert done.fault == f"cannot write to {out}: no space left on device; make room there, or give another --out"
    assert {path.name: path.read_bytes() for path in Path("there").iterdir()} == before
    assert list(Path("new").iterdir()) == []


def test_an_export_that_was_killed_between_its_files_is_done_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lowmem_pnn("export run --exit 1 --out there").code == 0
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if Path(target).name == "model.safetensors":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        assert lowmem_pnn("export run --exit 2 --out there").code == 130
    Path("there/.export.abcdefgh").mkdir()
    assert lowmem_pnn("export run --exit 2 --out there").code == 0
    assert sorted(path.name for path in Path("there").iterdir()) == ["export.json", "model.pt2", "model.safetensors"]


# Places that cannot be written to, and what is left to be cleaned up.


def _read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the run's folder one that cannot be written to; this process may be the superuser, whom access rights do not stop."""

    def refuse(folder: Path) -> None:
        raise DiskError(f"cannot open {folder / 'lock'}: read-only file system; choose a --workdir that can be written")

    monkeypatch.setattr(run_directory, "take_lock", refuse)


def test_a_finished_run_in_a_place_that_cannot_be_written_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lowmem_pnn("evaluate run").out
    before = sorted(run.rglob("*"))
    _read_only(monkeypatch)
    assert lowmem_pnn("evaluate run").out == expected
    assert lowmem_pnn("fit --resume --workdir run").code == 0
    assert lowmem_pnn("export run --exit 1 --out there").code == 0
    assert sorted(run.rglob("*")) == before
    change_journal(run, stage="training")
    for command, code in zip(COMMANDS, (6, 6, 5), strict=True):
        assert lowmem_pnn(command).code == code


def test_what_a_killed_end_has_left_is_cleaned_up(run: Path) -> None:
    expected = sorted(path.name for path in run.iterdir())
    for command in COMMANDS:
        for name in ("weights", "activations/b01-train", "scratch.abcdefgh/weights", "mine"):
            (run / name).mkdir(parents=True, exist_ok=True)
        for name in ("weights/p000.g000001.safetensors", "result.json.new", "model.safetensors.new", "mine.new"):
            (run / name).write_text("left")
        body, config = read_journal(run / "journal.json")
        (run / "journal.000003.json").write_text(seal_journal({**body, "number": 3, "stage": "training"}, config))
        assert lowmem_pnn(command).code == 0
        assert sorted(path.name for path in run.iterdir()) == sorted([*expected, "mine", "mine.new"])


# Runs of others.


@pytest.mark.parametrize("name", ["lock", "weights", "activations", "metrics.jsonl", "journal.json.new", "result.json.new"])
def test_links_in_a_run_are_not_followed(run: Path, name: str) -> None:
    victim = Path("victim")
    if name in ("weights", "activations"):
        victim.mkdir()
        (victim / "p000.g000001.safetensors").write_text("mine")
    else:
        victim.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("../victim")
    for command in COMMANDS:
        done = lowmem_pnn(command)
        assert done.code in (0, 6), done.err
        assert done.code == (6 if name in ("lock", "weights", "activations") else 0), done.err
        assert done.code == 0 or f"run/{name}' is a link" in done.fault
    assert (victim / "p000.g000001.safetensors" if victim.is_dir() else victim).read_text() == "mine"


NET = """
import torch
from pathlib import Path
Path(__file__).with_name("ran").touch()
def build():
    return torch.nn.Linear(20, 3)
"""


def test_code_that_a_run_names_runs_only_where_it_is_named_again_or_trusted(run: Path) -> None:
    folder = Path.cwd()
    (folder / "net.py").write_text(NET)
    assert train(model="net.py:build", workdir="other").code == 0
    (folder / "ran").unlink()
    shutil.copytree("other", "unfinished")
    change_journal(Path("unfinished"), stage="born", weights={}, files={}, visit=0, activations={})
    for command in ("evaluate other", "export other"):
        done = lowmem_pnn(command)
        assert (done.code, done.fault) == (3, f"the run in other would run code from {folder}/net.py:build; give --trust"), (
            done.err
        )
    done = lowmem_pnn("fit --resume --workdir unfinished")
    spec = f"{folder}/net.py:build"
    assert (done.code, done.fault) == (
        3,
        f"the run in unfinished would run code from {spec}; give --model {spec} again, or --trust",
    )
    assert lowmem_pnn("fit --resume --workdir other").code == 0, "a result is read without its model"
    assert not (folder / "ran").exists()
    assert "--trust has no effect here" in train("--trust", workdir="third").fault
    for number, more in enumerate(("--trust", "--model net.py:build")):
        shutil.copytree("unfinished", f"unfinished{number}")
        assert lowmem_pnn(f"fit --resume --workdir unfinished{number} {more}").code == 0
    assert lowmem_pnn("evaluate other --trust").code == lowmem_pnn("export other --trust").code == 0
    assert package.evaluate("other", trust=True) == package.evaluate(Path("other"), trust=True)


def test_a_configuration_that_no_run_has_is_refused(run: Path) -> None:
    import hashlib

    for changes, text in (
        ({"epochs": [0]}, "--epochs 0"),
        ({"unheard": 1}, "there is no option --unheard"),
        ({"recovery_epochs": 1}, "--recovery-epochs has no effect here"),
        ({"recovery_epochs": 0, "train_limit": 10**30}, "config.json is of no run: --train-limit is beyond 64 bits"),
        ({"train_limit": None, "max_gpu_mem": "x"}, "--max-gpu-mem"),
        ({"max_gpu_mem": 10**8, "batch_size": [1e400]}, "--batch-size"),
    ):
        content = json.dumps({**json.loads((run / "config.json").read_text()), **changes})
        (run / "config.json").write_text(content)
        body, _ = read_journal(run / "journal.json")
        digest = hashlib.sha256(content.encode()).hexdigest()
        (run / "journal.json").write_text(seal_journal({**body, "stage": "training"}, digest))
        done = lowmem_pnn("fit --resume --workdir run")
        assert (done.code, text in done.fault) == (6, True), done.err
        (run / "config.json").write_text(
            json.dumps({k: v for k, v in json.loads(content).items() if k != "unheard"} | {"epochs": [1]})
        )


def test_a_result_that_is_asked_for_in_python_is_checked_too(run: Path) -> None:
    _flip(run / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"run/model.safetensors has sha256 .*; restore it from a copy"):
        package.evaluate(run)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("journal.json", "evaluate run"),
        ("config.json", "evaluate run"),
        ("result.json", "fit --resume --workdir run"),
        ("model.safetensors", "fit --resume --workdir run"),
        ("export.json", "export run --exit 1 --out out"),
    ],
)
def test_a_drive_that_does_not_read_a_file_is_not_taken_for_damage(
    run: Path, name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out").mkdir()
    Path("out/export.json").write_text("{}")
    system_open = os.open

    def fail(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).name == name:
            raise OSError(errno.EIO, "Input/output error")
        return system_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    done = lowmem_pnn(command)
    assert done.code == 5
    assert "input/output error" in done.fault
    assert "; check the disk and its access rights" in done.fault

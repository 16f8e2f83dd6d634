"""Run directories: born whole, locked, moved by their journal, and refused by name when damaged."""

import contextlib
import errno
import io
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowmem_pnn.errors import BusyError, CheckpointError, ConfigError, DiskError
from lowmem_pnn.stores import disk, run_creation, run_directory
from lowmem_pnn.stores.disk import write_durably
from lowmem_pnn.stores.journal import older_commits
from lowmem_pnn.stores.run_directory import RunDirectory


def body(number: int = 0, **more: Any) -> dict[str, Any]:
    return {"number": number, **more}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_creation, "_LOCK_PATIENCE_SECONDS", 0.2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def make(path: Path, **options: Any) -> RunDirectory:
    return RunDirectory.create(path, '{"lr": 1}', body(), **options)


def test_a_run_is_born_with_its_configuration_and_journal(path: Path) -> None:
    with make(path / "deep" / "ü ñ") as run:
        assert run.config_json() == '{"lr": 1}'
        assert run.journal() == body()
        assert {entry.name for entry in run.path.iterdir()} == {"config.json", "journal.json", "lock"}
        assert run.path.stat().st_mode & 0o777 == 0o777 & ~run_creation._umask()
    assert [entry.name for entry in (path / "deep").iterdir()] == ["ü ñ"], "nothing is left beside it"


@pytest.mark.parametrize("point", ["written config.json", "renamed journal.json", "synced", "born"])
def test_a_birth_that_is_cut_short_leaves_nothing(path: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        if name.startswith(point):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "commit_point", fail)
    with pytest.raises(DiskError, match="no space left on device"):
        make(path)
    assert list(path.parent.iterdir()) == []
    path.mkdir()
    if point != "born":
        with pytest.raises(DiskError, match="no space left on device"):
            make(path)
        assert list(path.iterdir()) == []


def test_what_a_journal_counts_on_is_on_the_drive_before_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points: list[str] = []
    with make(path) as run:
        monkeypatch.setattr(disk, "commit_point", points.append)
        (path / "weights").mkdir()
        run.log({"loss": 1})
        run.commit(body(1))
        run.log({"loss": 2})
        run.commit(body(2))
        (path / "activations").mkdir()
        run.commit(body(3))
    journal = ["written journal.json", "renamed journal.json", "synced run"]
    new_names = ["synced metrics.jsonl", "synced run"]
    assert points == [*new_names, *journal, "synced metrics.jsonl", *journal, *new_names, *journal]


def test_an_empty_folder_becomes_a_run_without_being_replaced(path: Path) -> None:
    path.mkdir()
    before = path.stat().st_ino
    with make(path) as run:
        assert path.stat().st_ino == before
        assert run.journal() == body()


@pytest.mark.parametrize("left", [["lock"], ["lock", "config.json"], ["lock", "config.json", "journal.json.new"]])
def test_what_a_killed_birth_left_is_no_obstacle(path: Path, left: list[str]) -> None:
    path.mkdir()
    for name in left:
        (path / name).write_text("half")
    with make(path) as run:
        assert run.config_json() == '{"lr": 1}'


def test_a_link_to_a_folder_is_followed(path: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "there", tmp_path / "not there"):
        link = tmp_path / f"link to {target.name}"
        link.symlink_to(target)
        if target.name == "there":
            target.mkdir()
        make(link).__exit__()
        make(link, overwrite=True).__exit__()
        assert link.is_symlink()
        assert (target / "journal.json").exists()


def test_what_is_there_is_not_replaced(path: Path) -> None:
    path.write_text("a file")
    with pytest.raises(ConfigError, match="run is a file; give a folder"):
        make(path)
    path.unlink()
    path.mkdir()
    (path / "thesis.txt").write_text("important")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is not empty and holds no run; give another folder"):
            make(path, overwrite=overwrite)
    # The names alone do not make it a run that was being born.
    (path / "thesis.txt").rename(path / "config.json")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        make(path, overwrite=True)
    assert (path / "config.json").read_text() == "important"


def test_a_run_is_replaced_only_with_overwrite(path: Path) -> None:
    with make(path) as run:
        run.log({"loss": 1})
        run.commit(body(1), keep=2)
        (path / "weights").mkdir()
        (path / "weights" / "p000.g000000.safetensors").touch()
    with pytest.raises(ConfigError, match="holds a run already; give --resume to go on with it, or --overwrite to replace it"):
        make(path)
    with make(path, overwrite=True) as run:
        assert run.journal() == body()
        assert {entry.name for entry in path.iterdir()} == {"config.json", "journal.json", "lock"}


@pytest.mark.parametrize("point", ["renamed journal.json", "emptied"])
def test_an_overwriting_that_is_cut_short_can_be_done_again_but_not_resumed(
    point: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make(path) as run:
        run.commit(body(1), keep=2)

    def fail(name: str) -> None:
        if name == point:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(disk, "commit_point", fail)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory.create(path, '{"lr": 2}', body(), overwrite=True)
    assert not older_commits(path)[0]
    with pytest.raises(CheckpointError, match="was being replaced by another one; begin that again with --overwrite"):
        RunDirectory.open(path)
    RunDirectory.create(path, '{"lr": 2}', body(), overwrite=True).__exit__()


def test_the_place_is_taken_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def intrude(name: str) -> None:
        if name == "born":
            path.mkdir()
            (path / "journal.json").touch()

    monkeypatch.setattr(disk, "commit_point", intrude)
    with pytest.raises(BusyError, match="was taken by another process just now; choose another folder"):
        make(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("place", ["/proc/run", "file/run", "x" * 300])
def test_a_place_that_cannot_be_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"cannot make --workdir .*; choose a folder that can be written"):
        make(tmp_path / place)


def test_one_process_at_a_time(path: Path) -> None:
    holder = "import sys; from pathlib import Path; from lowmem_pnn.stores.run_directory import RunDirectory\n"
    holder += "run = RunDirectory.open(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    make(path).__exit__()
    other = subprocess.Popen([sys.executable, "-c", holder, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        text = f"run is in use by process {other.pid}; wait for it, or choose another folder"
        with pytest.raises(BusyError, match=text):
            RunDirectory.open(path)
        with pytest.raises(BusyError, match=text):
            make(path, overwrite=True)
        assert (path / "journal.json").exists()
        other.kill()
        # At once: the lock of a process that is dying is waited for.
        RunDirectory.open(path).__exit__()


def test_a_folder_that_is_no_run_is_not_opened(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run holds no run; give the folder of one$"):
        RunDirectory.open(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match="holds no run"):
        RunDirectory.open(path)
    assert list(path.iterdir()) == [], "looking leaves nothing behind"


def _damages() -> Iterator[Any]:
    yield pytest.param(lambda text: "", "is no journal", id="empty")
    yield pytest.param(lambda text: text[: len(text) // 2], "is no journal", id="cut short")
    yield pytest.param(lambda text: "[]", "is no journal", id="a list")
    yield pytest.param(lambda text: "\0" * len(text), "is no journal", id="zeros")
    yield pytest.param(lambda text: text.replace('"number": 0', '"number": 7'), "does not match its checksum", id="edited")
    yield pytest.param(
        lambda text: text.replace('"format": 1', '"format": 99'), "has format 99, this version reads 1", id="later"
    )


@pytest.mark.parametrize(("damage", "text"), list(_damages()))
def test_a_damaged_journal_is_refused_and_the_lock_freed(path: Path, damage: Any, text: str) -> None:
    make(path).__exit__()
    journal = path / "journal.json"
    journal.write_text(damage(journal.read_text()))
    with pytest.raises(CheckpointError, match=text):
        RunDirectory.open(path)
    make(path, overwrite=True).__exit__()


def test_a_configuration_that_was_edited_is_refused(path: Path) -> None:
    make(path).__exit__()
    (path / "config.json").write_text('{"lr": 2}')
    with RunDirectory.open(path) as run:
        with pytest.raises(CheckpointError, match=r"config.json is not the configuration that the run began with"):
            run.config_json()
        (path / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"config.json: no such file or directory; restore it from a copy"):
            run.config_json()


def test_a_commit_replaces_the_journal_and_keeps_what_was_asked(path: Path) -> None:
    with make(path) as run:
        assert run.commit(body(1)) == [body(1)]
        assert run.commit(body(2), keep=2) == [body(2), body(1)]
        assert run.commit(body(3), keep=3) == [body(3), body(2), body(1)]
        assert run.commit(body(4), keep=2) == [body(4), body(3)]
        assert run.older_journals() == [body(3)]
        assert run.commit(body(5)) == [body(5)]
    with RunDirectory.open(path) as run:
        assert (run.journal(), run.older_journals(), run.config_json()) == (body(5), [], '{"lr": 1}')


def test_commits_after_one_that_somebody_went_back_to_replace_newer_ones(path: Path) -> None:
    with make(path) as run:
        for number in (1, 2, 3):
            run.commit({**body(number), "first": True}, keep=9)
        (path / "journal.json").write_bytes((path / "journal.000001.json").read_bytes())
        assert run.commit(body(2), keep=9) == [body(2), {**body(1), "first": True}, body(0)]
        assert run.commit(body(3), keep=9)[:2] == [body(3), body(2)]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_commits_are_kept_by_copies_where_there_are_no_links(path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with make(path) as run:
        run.commit(body(1))
        assert run.commit(body(2), keep=2) == [body(2), body(1)]
        assert run.older_journals() == [body(1)]


def test_a_run_is_held_where_folders_cannot_be_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with make(path) as run:
        assert run.commit(body(1)) == [body(1)]
    assert not disk.sync_folder(path)


def test_a_commit_that_is_not_written_leaves_the_one_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(path) as run:
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(DiskError, match="no space left on device"):
            run.commit(body(1))
        assert run.journal() == body()
        assert not list(path.glob("*.new"))


def test_metrics_are_cut_to_the_last_commit(path: Path) -> None:
    with make(path) as run:
        run.log({"epoch": 1})
        size = run.metrics_bytes()
        run.log({"epoch": 2})
        assert [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] == [{"epoch": 1}, {"epoch": 2}]
        run.cut_metrics(10**6)  # as after a crash that lost the file's tail: nothing to cut
        run.cut_metrics(size)
        run.log({"epoch": 3})
        assert (path / "metrics.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 3}\n'
        assert run.disk_bytes() > 0


def test_a_line_of_metrics_that_is_taken_in_parts_is_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.FileIO):
        def write(self, content: Any) -> int:
            return super().write(content[:5])

    monkeypatch.setattr(run_directory.io, "FileIO", Slow)
    with make(path) as run:
        for number in range(3):
            run.log({"step": number, "loss": 0.5})
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_metrics_on_a_full_disk_are_an_error_once(path: Path) -> None:
    with make(path) as run:
        run.log({"epoch": 1})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        try:
            with pytest.raises(DiskError, match="file too large"):
                run.log({"epoch": 1})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# What others have put there.


def test_overwriting_keeps_what_is_not_the_runs(path: Path) -> None:
    with make(path) as run:
        run.log({"loss": 1})
        run.commit(body(1), keep=3)
        run.commit(body(2), keep=3)
    kept = [
        "thesis.txt",
        "exit-1/model.safetensors",
        "journal.backup.json",
        "journal.000009.json",
        "scratch.txt",
        "model.safetensors.txt",
    ]
    gone = [
        "weights/p000.g000000.safetensors", "activations/b01-train/index.json", "scratch.abcdefgh/weights/x", "model.safetensors",
        "heads.safetensors", "result.json", "result.json.new",
    ]  # fmt: skip
    for name in (*kept, *gone):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")
    with make(path, overwrite=True) as run:
        assert run.journal() == body()
    left = {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file()}
    assert left == {*kept, "config.json", "journal.json", "lock"}
    assert all((path / name).read_text() == "mine" for name in kept)


def test_a_damaged_older_commit_is_no_obstacle(path: Path) -> None:
    with make(path) as run:
        for number in range(1, 5):
            run.commit(body(number), keep=5)
    (path / "journal.000001.json").write_text("cut sho")
    (path / "journal.000002.json").write_text((path / "journal.000003.json").read_text())
    (path / "journal.backup.json").write_text("mine")
    with RunDirectory.open(path) as run:
        assert run.journal() == body(4)
        assert run.older_journals() == [body(3), body(0)]
        assert [one.name for one in run.damaged_journals()] == ["journal.000002.json", "journal.000001.json"]
        assert run.commit(body(5), keep=2) == [body(5), body(4)]
        run.clear()
    left = {entry.name for entry in path.iterdir()}
    assert left == {"journal.json", "journal.000001.json", "journal.000002.json", "journal.backup.json", "config.json", "lock"}


@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_a_damaged_last_commit_says_how_to_go_on_from_the_one_before(path: Path, damage: str) -> None:
    file = {"file": "p000.g000001.safetensors", "sha256": "", "bytes": 4}
    weights = {"format": 1, "partitions": [file], "rest": None}
    with RunDirectory.create(path, '{"model": "net.py:build"}', body()) as run:
        (path / "weights").mkdir()
        (path / "weights" / file["file"]).write_text("four")  # type: ignore[operator]
        run.commit(body(1, weights=weights), keep=4)
        run.commit(body(2, weights={**weights, "partitions": [{**file, "bytes": 5}]}), keep=4)
        run.commit(body(3, weights=weights), keep=4)
    journal = path / "journal.json"
    journal.write_text("cut sho") if damage == "cut short" else journal.unlink()
    way = (
        f"; or go back to the commit before: cp {path}/journal.000001.json {journal} && "
        f"lowmem-pnn fit --resume --workdir {path} --trust"
    )
    with pytest.raises(CheckpointError) as error:
        RunDirectory.open(path)
    assert str(error.value).endswith(way)
    (path / "weights" / file["file"]).unlink()  # type: ignore[operator]
    with pytest.raises(CheckpointError) as error:
        RunDirectory.open(path)
    assert str(error.value).endswith(f"journal.000000.json {journal} && lowmem-pnn fit --resume --workdir {path} --trust")
    (path / "journal.000000.json").replace(journal)
    RunDirectory.open(path).__exit__()


def test_links_in_a_run_are_not_followed(path: Path, tmp_path: Path) -> None:
    make(path).__exit__()
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("mine")
    folder.mkdir()
    (folder / "p000.g000001.safetensors").write_text("mine")
    for name, target in (("metrics.jsonl", victim), ("journal.json.new", victim), ("lock", victim), ("weights", folder)):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)
        if name in ("lock", "weights"):
            with pytest.raises(CheckpointError, match=f"run/{name}' is a link"):
                RunDirectory.open(path)
            (path / name).unlink()
            continue
        with RunDirectory.open(path) as run:
            with contextlib.suppress(CheckpointError):
                run.log({"epoch": 1})
            with contextlib.suppress(CheckpointError):
                run.cut_metrics(0)
            run.commit(body(1))
    (path / "weights").symlink_to(folder)
    (path / "activations").symlink_to(folder)
    make(path, overwrite=True).__exit__()
    assert not (path / "weights").is_symlink()
    assert (victim.read_text(), (folder / "p000.g000001.safetensors").read_text()) == ("mine", "mine")


@pytest.mark.parametrize("name", ["journal.json", "config.json", "lock", "metrics.jsonl", "journal.000007.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(path: Path, name: str) -> None:
    make(path).__exit__()
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    if name == "journal.000007.json":
        with RunDirectory.open(path) as run:
            assert [one.name for one in run.damaged_journals()] == [name]
        return

    def use() -> None:
        with RunDirectory.open(path) as run:
            run.config_json()
            run.log({"epoch": 1})

    with pytest.raises(CheckpointError, match=f"run/{name}' is a pipe, not a file"):
        use()


def test_a_file_of_terabytes_is_not_read(path: Path) -> None:
    make(path).__exit__()
    os.truncate(path / "journal.json", 1 << 40)
    with pytest.raises(CheckpointError, match=r"has 1\.10 TB, above 67\.1 MB"):
        RunDirectory.open(path)


def test_what_a_killed_creation_left_beside_is_deleted(path: Path) -> None:
    for name, files in ((".run.abcdefgh", ["lock", "config.json"]), (".run.12345678", ["lock", "x"]), (".run.abc", ["lock"])):
        (path.parent / name).mkdir()
        for file in files:
            (path.parent / name / file).touch()
    held = path.parent / ".run.hhhhhhhh"
    held.mkdir()
    with run_creation.take_lock(held):
        make(path).__exit__()
    assert {entry.name for entry in path.parent.iterdir()} == {"run", ".run.12345678", ".run.abc", ".run.hhhhhhhh"}


def test_a_run_that_can_only_be_read_is_opened_to_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path).__exit__()

    def refuse(folder: Path) -> None:
        raise DiskError("read-only file system")

    monkeypatch.setattr(run_directory, "take_lock", refuse)
    with pytest.raises(DiskError, match="read-only file system"):
        RunDirectory.open(path)
    before = sorted(path.iterdir())
    with RunDirectory.open(path, to_read=True) as run:
        assert run.journal() == body()
        assert not run.is_writable
        with pytest.raises(DiskError, match="read-only file system"):
            run.check_writable()
        run.clear()
        with run.scratch() as folder:
            assert not folder.is_relative_to(path)
            (folder / "x").mkdir()
        assert not folder.exists()
    assert sorted(path.iterdir()) == before


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    write_durably(target, "old")
    write_durably(target, "new ü")
    assert target.read_text(encoding="utf-8") == "new ü"
    with pytest.raises(DiskError, match="no such file or directory"):
        write_durably(tmp_path / "nowhere" / "x", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]

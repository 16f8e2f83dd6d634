"""Places of answers: written beside and renamed, and nothing that is there is replaced without a word."""

import errno
from contextlib import suppress
from pathlib import Path

import pytest

from lowmem_pnn.errors import ConfigError, DiskError
from lowmem_pnn.exporting.out_faults import writing_faults
from lowmem_pnn.inference.places import Place


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text("mine")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("masks/deep").mkdir(parents=True)
    Path("masks/deep/1.png").write_text("old")
    Path("link").symlink_to("masks")
    Path("link.csv").symlink_to("there.csv")
    Path("file").write_text("mine")


@pytest.mark.parametrize(
    ("out", "kind"), [("o.npz", "npz"), ("o.CSV", "csv"), ("o/", "masks"), ("o", "masks"), ("new/place/o.csv", "csv")]
)
def test_the_kind_follows_from_the_name(out: str, kind: str) -> None:
    assert Place.find(out, overwrite=False) == Place(Path(out), kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("out", "overwrite", "message"),
    [
        ("", False, "--out is empty; give FILE.npz, FILE.csv, or a folder for masks, DIR/"),
        ("o.json", False, "--out o.json ends in '.json'; give FILE.npz, FILE.csv, or a folder for masks, DIR/"),
        ("there.csv", False, "--out there.csv is there already; give another, or --overwrite"),
        ("masks", False, "--out masks is there already; give another, or --overwrite"),
        ("link.csv", True, "--out link.csv is a link, and is not replaced; give another"),
        ("link", True, "--out link is a link, and is not replaced; give another"),
        ("full", True, "--out full is a folder with notes.txt in it, which is no mask, and is not replaced; give another"),
        ("file", True, "--out file is a file, and masks take a folder; give another"),
        ("full/notes.txt/o.csv", False, "--out full/notes.txt/o.csv lies below full/notes.txt, which is a file; give another"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_computed(out: str, overwrite: bool, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Place.find(out, overwrite)
    assert str(caught.value) == message


def test_a_file_takes_its_place_when_it_is_complete() -> None:
    place = Place.find("there.csv", overwrite=True)
    with place.writing() as folder:
        (folder / "there.csv").write_text("new")
        assert Path("there.csv").read_text() == "mine"
    assert Path("there.csv").read_text() == "new"
    with suppress(KeyboardInterrupt), place.writing() as folder:
        (folder / "there.csv").write_text("newer")
        raise KeyboardInterrupt
    assert Path("there.csv").read_text() == "new"
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize("name", ["masks", "before"])
def test_a_folder_of_masks_replaces_the_one_before(name: str) -> None:
    Path("masks").rename(name)
    with Place.find(f"{name}/", overwrite=True).writing() as folder:
        (folder / name).mkdir()
        (folder / name / "2.png").write_text("new")
        assert Path(f"{name}/deep/1.png").read_text() == "old"
    assert [path.name for path in Path(name).rglob("*")] == ["2.png"]
    assert not list(Path().glob(".*"))


def test_a_full_disk_is_one_line() -> None:
    with pytest.raises(DiskError) as caught, writing_faults(Path("o.npz")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == "cannot write to o.npz: no space left on device; make room there, or give another --out"
    Path("closed").mkdir()
    with pytest.raises(DiskError) as caught, writing_faults(Path("o.npz")):
        raise OSError(errno.EROFS, "Read-only file system")
    assert str(caught.value) == (
        "cannot write to o.npz: read-only file system; check the disk and its access rights, or give another --out"
    )

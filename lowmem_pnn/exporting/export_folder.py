"""Export folder: the files of an export, written whole or not at all, and never over what an export did not write."""

import dataclasses
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem_pnn.errors import CheckpointError, ConfigError
from lowmem_pnn.exporting.out_faults import OUT_REMEDY, writing_faults
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.stores.disk import disk_error, open_regular, read_file, remove_folder, sha256, sync_folder, write_durably
from lowmem_pnn.stores.journal import JOURNAL
from lowmem_pnn.stores.keys import CommittedFile, parse_entry

MANIFEST = "export.json"
FILES = ("model.pt2", "model.safetensors", "model.onnx")

_TEMPORARY = re.compile(r"\.export\.[a-z0-9_]{8}")  # as `tempfile.mkdtemp` names it


class HashedFile(io.FileIO):
    """New file that is written front to back, and hashed on the way.

    A writer in C++ may not survive an exception out of `write`: so a failure is kept, the rest is left out, and `finish` raises it.

    Args:
        path: path of the new file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x")
        self._path = path
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._failure: OSError | None = None

    def write(self, content: Any) -> int:
        """Write bytes; return their number, written or not."""
        view = memoryview(content).cast("B")
        try:
            done = 0
            while done < len(view) and self._failure is None:
                done += super().write(view[done:]) or 0
        except OSError as error:
            self._failure = error
        self._digest.update(view)
        self._bytes += len(view)
        return len(view)

    def finish(self) -> CommittedFile:
        """Bring the file to the drive.

        Returns:
            Its name, hash and size.

        Raises:
            OSError: it could not be written.
        """
        if self._failure is not None:
            raise self._failure
        os.fsync(self.fileno())
        return CommittedFile(self._path.name, self._digest.hexdigest(), self._bytes)


@dataclass(frozen=True)
class ExportFolder:
    """Folder that an export may write its files to.

    Args:
        path: path of the folder, which need not be there.
        before: what an earlier export has left there, by name.
    """

    path: Path
    before: Mapping[str, CommittedFile] = dataclasses.field(default_factory=dict)

    @classmethod
    def find(cls, run: Path, number: int | None, result: Result, out: Path | None) -> "ExportFolder":
        """Find the folder of an export, before anything is computed for it.

        Args:
            run: folder of the run.
            number: number of the exit, from 0; None for the whole model.
            result: result of the run.
            out: folder that was asked for; None for one in the run's folder.

        Raises:
            ConfigError: the folder holds a run, a part of one, or files that no export wrote.
            DiskError: the file system refused.
        """
        own = run / ("export" if number is None else f"exit-{number + 1}")
        folder = own if out is None else out
        try:
            inside = folder.resolve()
            if out is None and folder.is_symlink():
                raise ConfigError(f"{folder} is a link, and is not written through; {OUT_REMEDY}")
            parts = [place for place in (inside, *inside.parents) if os.path.exists(place / JOURNAL)]  # noqa: PTH110 - never raises
            if inside in parts:
                raise ConfigError(f"--out {folder} holds a run, and an export would replace its weights; give --out {own}")
            if any(place.name in ("weights", "activations") and place.parent in parts for place in (inside, *inside.parents)):
                raise ConfigError(f"--out {folder} is a folder of a run, which deletes it; give --out {own}")
            if folder.exists() and not folder.is_dir():
                raise ConfigError(f"--out {folder} is a file; {OUT_REMEDY}")
            return cls(folder, _before(folder))
        except OSError as error:
            raise disk_error(folder, error, "look into it") from error

    def write(
        self, writers: Mapping[str, Callable[[HashedFile], object]], check: Callable[[Path], object] = lambda folder: None
    ) -> None:
        """Write the files of an export: all beside their places first, then the manifest, then each is renamed.

        Args:
            writers: what writes each file, by its name.
            check: is shown the folder in which the files lie, complete, before they take their places.

        Raises:
            DiskError: the disk is full or not writable; nothing is changed then.
        """
        temporary: Path | None = None
        try:
            with writing_faults(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                for left in self.path.iterdir():
                    if _TEMPORARY.fullmatch(left.name) and not left.is_symlink():
                        remove_folder(left)  # of an export that was killed
                temporary = Path(tempfile.mkdtemp(prefix=".export.", dir=self.path))
                written = {name: _write(temporary / name, write) for name, write in writers.items()}
                check(temporary)
                # Old and new: whatever comes between the renames, the files are known to be an export's.
                manifest = {"files": _entries(written), "before": _entries(self.before)}
                write_durably(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
                for name in written:
                    (temporary / name).replace(self.path / name)
                sync_folder(self.path)
                sync_folder(self.path.parent)
        finally:
            if temporary is not None:
                remove_folder(temporary)


def _write(path: Path, write: Callable[[HashedFile], object]) -> CommittedFile:
    with HashedFile(path) as file:
        write(file)
        return file.finish()


def _entries(files: Mapping[str, CommittedFile]) -> dict[str, Any]:
    return {name: asdict(file) for name, file in files.items()}


def _before(folder: Path) -> dict[str, CommittedFile]:
    """Return what an earlier export has left in a folder.

    Raises:
        ConfigError: a file of an export's name is none that an export wrote.
        DiskError: the file system refused, as it may with OSError.
    """
    there = [name for name in (*FILES, MANIFEST) if os.path.lexists(folder / name)]
    if not there:
        return {}
    known: list[CommittedFile] = []
    no_manifest = (FileNotFoundError, CheckpointError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
    with suppress(*no_manifest):
        manifest = json.loads(read_file(folder / MANIFEST, OUT_REMEDY))
        known = [parse_entry(entry, name) for part in ("files", "before") for name, entry in manifest[part].items()]
    found = {}
    for name in there:
        if name == MANIFEST and known:
            continue
        if not any(file.file == name and _is(folder / name, file) for file in known):
            raise ConfigError(f"{folder / name} is there, and no export of this program has left it so; {OUT_REMEDY}")
        found[name] = next(file for file in known if file.file == name and _is(folder / name, file))
    return found


def _is(path: Path, expected: CommittedFile) -> bool:
    """Whether a file is what a manifest says of it."""
    try:
        os.close(open_regular(path, remedy=OUT_REMEDY))
        return not path.is_symlink() and path.stat().st_size == expected.bytes and sha256(path) == expected.sha256
    except (CheckpointError, FileNotFoundError):
        return False

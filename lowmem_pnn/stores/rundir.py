"""The run directory: born whole, locked by one process, moved from commit to commit by its journal.

    RUN/
      config.json           what was asked
      journal.json          the last commit: plan, position, names and hashes of the files that belong to it
      journal.000041.json   an older commit, where more than one is kept
      metrics.jsonl         a line per logged step; what a commit does not cover is cut off at resume
      lock                  held by the process that works here
      weights/ activations/ gone when the run is done
      model.safetensors result.json

A commit: new bytes lie in files of their own, on the platter; then the journal is written beside its place, synced, and renamed; then
what no journal names is deleted. What is not in the journal did not happen.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

from lowmem_pnn.errors import BusyError, CheckpointError, ConfigError, DiskError
from lowmem_pnn.stores import disk
from lowmem_pnn.stores.disk import disk_error, sync_folder

FORMAT = 1


def write_durably(path: Path, text: str) -> None:
    """Replace a file so that it is whole, old or new, whatever happens.

    Args:
        path: the file; its folder must exist.
        text: the new content, written as UTF-8.

    Raises:
        DiskError: the disk is full or not writable.
    """
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        disk.commit_point(f"written {path.name}")
        beside.replace(path)
        disk.commit_point(f"renamed {path.name}")
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error, "write it") from error


def seal_journal(body: dict[str, Any]) -> str:
    """A journal's text: the body with its checksum."""
    content = json.dumps(body, sort_keys=True)
    return json.dumps(
        {"format": FORMAT, "sha256": hashlib.sha256(content.encode()).hexdigest(), "body": body}, indent=1, sort_keys=True
    )


def read_journal(path: Path) -> dict[str, Any]:
    """Read and check a journal.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        body = sealed["body"]
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        version, intact = sealed["format"], digest == sealed["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is no run to resume; give the --workdir of one") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is no journal; the run cannot be resumed from it") from None
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; the run cannot be resumed from it")
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}, this version reads {FORMAT}; resume with the version that wrote it")
    assert isinstance(body, dict)
    return body


class RunDir:
    """A run directory that this process holds the lock of.

    Made by `create` or `open`; used as a context, which frees the lock.

    Args:
        path: the directory.
        lock: the open lock file.
    """

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock
        self._metrics: IO[str] | None = None

    @classmethod
    def create(cls, path: Path, config_json: str, journal: dict[str, Any], *, overwrite: bool = False) -> "RunDir":
        """Make a run directory: beside its place, complete with configuration and first journal, then renamed.

        Args:
            path: its place. It may exist if it is empty.
            config_json: the configuration's text.
            journal: the first commit.
            overwrite: replace a run that is there.

        Raises:
            ConfigError: something else is there, or a run and not `overwrite`.
            BusyError: another process works in the run that would be replaced.
            DiskError: the place is not writable.
        """
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--workdir {path} is a file; give a folder")
        occupied = path.is_dir() and any(path.iterdir())
        if occupied and not (path / "journal.json").exists():
            raise ConfigError(f"--workdir {path} is not empty and holds no run; give another folder")
        if occupied and not overwrite:
            raise ConfigError(
                f"--workdir {path} holds a run already; give --resume to go on with it, or --overwrite to replace it"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            born = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        except OSError as error:
            raise DiskError(f"cannot make --workdir {path}: {error.strerror}; choose a folder that can be written") from error
        try:
            born.chmod(0o777 & ~_umask())
            write_durably(born / "config.json", config_json)
            write_durably(born / "journal.json", seal_journal(journal))
            lock = _take_lock(born)
            if occupied:
                with _take_lock(path):  # nobody works there
                    shutil.rmtree(path)
            disk.commit_point("born")
            born.rename(path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(born, ignore_errors=True)
            raise
        return cls(path, lock)

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """Take over an existing run.

        Raises:
            CheckpointError: there is no run.
            BusyError: another process works in it.
        """
        if not (path / "journal.json").exists():
            raise CheckpointError(
                f"--workdir {path} holds no run to resume; give the folder of one, or leave --resume out to begin"
            )
        return cls(path, _take_lock(path))

    def config_json(self) -> str:
        """The configuration's text."""
        try:
            return (self.path / "config.json").read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{self.path / 'config.json'}: {error.strerror}; the run cannot be resumed") from error

    def journal(self) -> dict[str, Any]:
        """The last commit."""
        return read_journal(self.path / "journal.json")

    def older_journals(self) -> list[dict[str, Any]]:
        """The commits before the last one that are kept, newest first."""
        return [read_journal(path) for path in sorted(self.path.glob("journal.*.json"), reverse=True)]

    def commit(self, journal: dict[str, Any], keep: int = 1) -> list[dict[str, Any]]:
        """Move to a new commit. The files that it names must be on the platter.

        Args:
            journal: JSON-able; `number`, one higher than the last one's, is part of it.
            keep: how many commits to keep, this one included.

        Returns:
            The kept commits, newest first: what none of them names can be deleted.
        """
        current = self.path / "journal.json"
        kept = [journal]
        if keep > 1:
            last = read_journal(current)
            # A copy by link: the rename below then replaces the name, not the bytes.
            with contextlib.suppress(FileExistsError):
                os.link(current, self.path / f"journal.{last['number']:06d}.json")
        write_durably(current, seal_journal(journal))
        older = sorted(self.path.glob("journal.*.json"), reverse=True)
        for path in older[keep - 1 :]:
            path.unlink()
        kept += [read_journal(path) for path in older[: keep - 1]]
        return kept

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def metrics_bytes(self) -> int:
        """The present length of `metrics.jsonl`, for the journal."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Drop what `metrics.jsonl` holds after the last commit."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            os.truncate(path, size)

    def disk_bytes(self) -> int:
        """What the run takes on disk now."""
        return sum(entry.stat().st_blocks * 512 for entry in self.path.rglob("*") if entry.is_file())

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._lock.close()


def _take_lock(folder: Path) -> IO[str]:
    """Open and lock `folder/lock`; the lock ends with the process, however that ends."""
    try:
        lock = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise DiskError(f"cannot open {folder / 'lock'}: {error.strerror}; choose a --workdir that can be written") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise BusyError(f"--workdir {folder} is in use by process {holder}; wait for it, or choose another folder") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

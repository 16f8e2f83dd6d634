"""Run directory: created complete, locked by one process, moved from commit to commit by its journal.

    RUN/
      config.json           the configuration
      journal.json          the last commit: plan, position, names and hashes of the files that belong to it
      journal.000041.json   an older commit, where more than one is kept
      metrics.jsonl         a line per logged step; what a commit does not cover is cut off at resume
      lock                  held by the process that works here
      weights/ activations/ deleted when the run is done
      model.safetensors result.json

A commit: new bytes lie in files of their own, on the drive; then the journal is written under another name, synced, and renamed; then
files that no journal names are deleted. What is not in the journal did not happen. A folder without a journal is no run.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from lowmem_pnn.errors import BusyError, CheckpointError, ConfigError, DiskError
from lowmem_pnn.stores import disk
from lowmem_pnn.stores.disk import disk_error, sync_folder

FORMAT = 1

# What to do about a run that is damaged.
_DAMAGED = "restore it from a copy, or begin again with --overwrite"
# A worker that was killed may hold the lock until the kernel has taken its memory back.
_LOCK_PATIENCE_SECONDS = 3.0
# Files that the creation of a run in an empty folder leaves behind when it is interrupted.
_FILES_BEFORE_JOURNAL = {"lock", "config.json", "config.json.new", "journal.json.new"}


def write_durably(path: Path, text: str) -> None:
    """Replace a file atomically: whatever happens, the file is whole, old or new.

    Args:
        path: Path of the file; its folder must exist.
        text: New content, written as UTF-8.

    Raises:
        DiskError: The disk is full or not writable.
    """
    new_path = path.with_name(path.name + ".new")
    try:
        with new_path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        disk.commit_point(f"written {path.name}")
        new_path.replace(path)
        disk.commit_point(f"renamed {path.name}")
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            new_path.unlink(missing_ok=True)
        raise disk_error(path, error, "write it") from error


def seal_journal(body: dict[str, Any], config_sha256: str) -> str:
    """Return a journal's text: the body with its checksum, and the checksum of the run's configuration."""
    sealed = {"format": FORMAT, "sha256": _digest(body, config_sha256), "config_sha256": config_sha256, "body": body}
    return json.dumps(sealed, indent=1, sort_keys=True)


def read_journal(path: Path) -> tuple[dict[str, Any], str]:
    """Read and check a journal.

    Returns:
        The journal's body, and the checksum of the run's configuration.

    Raises:
        CheckpointError: The journal is missing, damaged, or of another version.
        DiskError: The file system refused.
    """
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        body, config_sha256, version = sealed["body"], sealed["config_sha256"], sealed["format"]
        intact = _digest(body, config_sha256) == sealed["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is no run to resume; give the --workdir of one") from None
    except OSError as error:
        raise disk_error(path, error, "read it") from error
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is no journal; {_DAMAGED}") from None
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}, this version reads {FORMAT}; resume with the version that wrote it")
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; {_DAMAGED}")
    assert isinstance(body, dict)
    return body, config_sha256


class RunDirectory:
    """Run directory whose lock this process holds.

    Made by `create` or `open`; used as a context, which frees the lock.

    Args:
        path: Path of the directory.
        lock: Open lock file.
        config_sha256: SHA-256 of the configuration's text.
    """

    def __init__(self, path: Path, lock: IO[str], config_sha256: str) -> None:
        self.path = path
        self._lock = lock
        self._config_sha256 = config_sha256
        self._metrics: IO[bytes] | None = None

    @classmethod
    def create(cls, path: Path, config_json: str, journal: dict[str, Any], *, overwrite: bool = False) -> "RunDirectory":
        """Create a run directory.

        The directory is made under another name, complete with configuration and first journal, then renamed. In a folder that exists
        (which may be a mount) the journal is written last instead, and makes the folder a run.

        Args:
            path: Path of the directory. It may exist if it is empty.
            config_json: The configuration's text.
            journal: Body of the first journal.
            overwrite: Whether to replace a run that is there.

        Raises:
            ConfigError: Something else is there, or a run and not `overwrite`.
            BusyError: Another process works in the run that would be replaced.
            DiskError: The folder is not writable.
        """
        digest = hashlib.sha256(config_json.encode()).hexdigest()
        try:
            if path.is_symlink():
                path = path.resolve()
            create = _create_in_folder if _is_usable_folder(path, overwrite) else _create_and_rename
            return cls(path, create(path, config_json, seal_journal(journal, digest)), digest)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DiskError(f"cannot make --workdir {path}: {reason}; choose a folder that can be written") from error

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open an existing run, and lock it.

        Raises:
            CheckpointError: There is no run, or its journal is damaged.
            BusyError: Another process works in the run.
            DiskError: The directory cannot be written to.
        """
        try:
            is_run = (path / "journal.json").exists()
        except OSError as error:
            raise disk_error(path, error, "look into it") from error
        if not is_run:
            raise CheckpointError(
                f"{path} holds no run to resume or evaluate; give the folder of one, or leave --resume out to begin"
            )
        lock = _take_lock(path)
        try:
            return cls(path, lock, read_journal(path / "journal.json")[1])
        except BaseException:
            lock.close()
            raise

    def config_json(self) -> str:
        """Return the configuration's text, compared with its checksum in the journal.

        Raises:
            CheckpointError: The configuration is missing, or was changed.
        """
        path = self.path / "config.json"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: {(error.strerror or str(error)).lower()}; {_DAMAGED}") from error
        if hashlib.sha256(content).hexdigest() != self._config_sha256:
            raise CheckpointError(f"{path} is not the configuration that the run began with; {_DAMAGED}")
        return content.decode()

    def journal(self) -> dict[str, Any]:
        """Return the body of the last commit's journal."""
        return read_journal(self.path / "journal.json")[0]

    def older_journals(self) -> list[dict[str, Any]]:
        """Return the bodies of the kept journals before the last one, newest first."""
        return [read_journal(path)[0] for path in sorted(self.path.glob("journal.*.json"), reverse=True)]

    def commit(self, journal: dict[str, Any], keep: int = 1) -> list[dict[str, Any]]:
        """Move to a new commit. The files that its journal names must be on the drive.

        Args:
            journal: Body of the journal, JSON-able, with `number`, one higher than in the last one.
            keep: Number of commits to keep, this one included.

        Returns:
            The bodies of the kept journals, newest first: files that none of them names can be deleted.

        Raises:
            DiskError: The disk is full or not writable; the last commit stands.
        """
        current = self.path / "journal.json"
        try:
            if keep > 1:
                # A copy by link: the rename below then replaces the name, not the bytes.
                previous = self.path / f"journal.{read_journal(current)[0]['number']:06d}.json"
                with contextlib.suppress(FileExistsError):
                    try:
                        os.link(current, previous)
                    except PermissionError:  # a file system without links
                        write_durably(previous, current.read_text(encoding="utf-8"))
            write_durably(current, seal_journal(journal, self._config_sha256))
            older = sorted(self.path.glob("journal.*.json"), reverse=True)
            for path in older[keep - 1 :]:
                path.unlink()
        except OSError as error:
            raise disk_error(current, error, "commit to it") from error
        return [journal, *(read_journal(path)[0] for path in older[: keep - 1])]

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`.

        Raises:
            DiskError: The disk is full or not writable.
        """
        path = self.path / "metrics.jsonl"
        try:
            if self._metrics is None:
                # Unbuffered: a buffered line that a full disk refused would be refused once more when the file is closed.
                self._metrics = path.open("ab", buffering=0)
            self._metrics.write((json.dumps(line) + "\n").encode())
        except OSError as error:
            raise disk_error(path, error, "write a line to it") from error

    def metrics_bytes(self) -> int:
        """Return the present length of `metrics.jsonl`, for the journal."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Cut `metrics.jsonl` to its length at the last commit."""
        path = self.path / "metrics.jsonl"
        # A longer size would fill the file up with zeros.
        if self.metrics_bytes() > size:
            try:
                os.truncate(path, size)
            except OSError as error:
                raise disk_error(path, error, "cut it") from error

    def disk_bytes(self) -> int:
        """Return the bytes that the run takes on disk now."""
        size = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                # Another thread may delete it meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    size += os.lstat(os.path.join(folder, name)).st_blocks * 512  # noqa: PTH118 - called for every commit
        return size

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._lock.close()


def _is_usable_folder(path: Path, overwrite: bool) -> bool:
    """Decide whether a path is a folder already; raise if it is one that may not become a run."""
    if not path.is_dir():
        if path.exists():
            raise ConfigError(f"--workdir {path} is a file; give a folder")
        return False
    names = {entry.name for entry in path.iterdir()}
    if "journal.json" in names:
        if not overwrite:
            raise ConfigError(
                f"--workdir {path} holds a run already; give --resume to go on with it, or --overwrite to replace it"
            )
    elif names and not ("lock" in names and names <= _FILES_BEFORE_JOURNAL):
        raise ConfigError(f"--workdir {path} is not empty and holds no run; give another folder")
    return True


def _create_and_rename(path: Path, config_json: str, journal: str) -> IO[str]:
    """Create a run where nothing is, under another name first; return its lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:200]}.", dir=path.parent))
    lock: IO[str] | None = None
    try:
        temporary.chmod(0o777 & ~_umask())
        write_durably(temporary / "config.json", config_json)
        write_durably(temporary / "journal.json", journal)
        lock = _take_lock(temporary)
        disk.commit_point("born")
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise BusyError(f"--workdir {path} was taken by another process just now; choose another folder") from error
            raise
        sync_folder(path.parent)
    except BaseException:
        if lock is not None:
            lock.close()
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return lock


def _create_in_folder(path: Path, config_json: str, journal: str) -> IO[str]:
    """Make a folder a run, in place of the run that it may hold; return its lock."""
    was_run = (path / "journal.json").exists()
    lock = _take_lock(path)
    try:
        # The old journal goes last, by the new one's rename: in between the folder is a damaged run, which can be overwritten.
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in ("lock", "journal.json"):
                entry.unlink()
        write_durably(path / "config.json", config_json)
        disk.commit_point("emptied")
        write_durably(path / "journal.json", journal)
    except BaseException:
        if not was_run:
            for name in ("journal.json", *_FILES_BEFORE_JOURNAL):
                (path / name).unlink(missing_ok=True)
        lock.close()
        raise
    return lock


def _digest(body: dict[str, Any], config_sha256: str) -> str:
    content = json.dumps(body, sort_keys=True) + config_sha256
    return hashlib.sha256(content.encode()).hexdigest()


def _take_lock(folder: Path) -> IO[str]:
    """Open and lock `folder/lock`, after a few seconds if another process holds it.

    The lock ends with the process, however the process ends.
    """
    try:
        lock = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DiskError(f"cannot open {folder / 'lock'}: {reason}; choose a --workdir that can be written") from error
    deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise BusyError(f"--workdir {folder} is in use by process {holder}; wait for it, or choose another folder") from None
        except OSError as error:
            lock.close()
            raise disk_error(folder / "lock", error, "lock it") from error
    # For people only: a full disk is no reason to stop here.
    with contextlib.suppress(OSError):
        lock.truncate(0)
        os.write(lock.fileno(), str(os.getpid()).encode())
    return lock


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

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
what no journal names is deleted. What is not in the journal did not happen. A folder without a journal is no run.
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
# What a birth in an empty folder leaves behind when it is cut short.
_UNBORN = {"lock", "config.json", "config.json.new", "journal.json.new"}


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
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise disk_error(path, error, "write it") from error


def seal_journal(body: dict[str, Any], config_sha256: str) -> str:
    """A journal's text: the body with its checksum, and that of the configuration that it belongs to."""
    sealed = {"format": FORMAT, "sha256": _digest(body, config_sha256), "config_sha256": config_sha256, "body": body}
    return json.dumps(sealed, indent=1, sort_keys=True)


def read_journal(path: Path) -> tuple[dict[str, Any], str]:
    """Read and check a journal.

    Returns:
        Its body, and the checksum of the configuration that it belongs to.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
        DiskError: the file system refused.
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
    """A run directory that this process holds the lock of.

    Made by `create` or `open`; used as a context, which frees the lock.

    Args:
        path: the directory.
        lock: the open lock file.
        config_sha256: of the configuration's text.
    """

    def __init__(self, path: Path, lock: IO[str], config_sha256: str) -> None:
        self.path = path
        self._lock = lock
        self._config_sha256 = config_sha256
        self._metrics: IO[bytes] | None = None

    @classmethod
    def create(cls, path: Path, config_json: str, journal: dict[str, Any], *, overwrite: bool = False) -> "RunDirectory":
        """Make a run directory.

        It is made beside its place, complete with configuration and first journal, then renamed. In a folder that exists (which may
        be a mount) the journal comes last instead, and makes it a run.

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
        digest = hashlib.sha256(config_json.encode()).hexdigest()
        try:
            if path.is_symlink():
                path = path.resolve()
            if _check_place(path, overwrite):
                return cls(path, _fill(path, config_json, seal_journal(journal, digest)), digest)
            return cls(path, _bear(path, config_json, seal_journal(journal, digest)), digest)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DiskError(f"cannot make --workdir {path}: {reason}; choose a folder that can be written") from error

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Take over an existing run.

        Raises:
            CheckpointError: there is no run, or its journal is damaged.
            BusyError: another process works in it.
            DiskError: it cannot be written to.
        """
        try:
            found = (path / "journal.json").exists()
        except OSError as error:
            raise disk_error(path, error, "look into it") from error
        if not found:
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
        """The configuration's text, as the journal's checksum says it is.

        Raises:
            CheckpointError: it is missing, or was changed.
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
        """The last commit."""
        return read_journal(self.path / "journal.json")[0]

    def older_journals(self) -> list[dict[str, Any]]:
        """The commits before the last one that are kept, newest first."""
        return [read_journal(path)[0] for path in sorted(self.path.glob("journal.*.json"), reverse=True)]

    def commit(self, journal: dict[str, Any], keep: int = 1) -> list[dict[str, Any]]:
        """Move to a new commit. The files that it names must be on the platter.

        Args:
            journal: JSON-able; `number`, one higher than the last one's, is part of it.
            keep: how many commits to keep, this one included.

        Returns:
            The kept commits, newest first: what none of them names can be deleted.

        Raises:
            DiskError: the disk is full or not writable; the last commit stands.
        """
        current = self.path / "journal.json"
        try:
            if keep > 1:
                # A copy by link: the rename below then replaces the name, not the bytes.
                kept = self.path / f"journal.{read_journal(current)[0]['number']:06d}.json"
                with contextlib.suppress(FileExistsError):
                    try:
                        os.link(current, kept)
                    except PermissionError:  # a file system without links
                        write_durably(kept, current.read_text(encoding="utf-8"))
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
            DiskError: the disk is full or not writable.
        """
        path = self.path / "metrics.jsonl"
        try:
            if self._metrics is None:
                # Unbuffered: what a full disk refused would be refused once more when the file is closed.
                self._metrics = path.open("ab", buffering=0)
            self._metrics.write((json.dumps(line) + "\n").encode())
        except OSError as error:
            raise disk_error(path, error, "write a line to it") from error

    def metrics_bytes(self) -> int:
        """The present length of `metrics.jsonl`, for the journal."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Drop what `metrics.jsonl` holds after the last commit."""
        path = self.path / "metrics.jsonl"
        # A longer size would fill the file up with zeros.
        if self.metrics_bytes() > size:
            try:
                os.truncate(path, size)
            except OSError as error:
                raise disk_error(path, error, "cut it") from error

    def disk_bytes(self) -> int:
        """What the run takes on disk now."""
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


def _check_place(path: Path, overwrite: bool) -> bool:
    """Whether a run directory's place is a folder already; one that may become a run."""
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
    elif names and not ("lock" in names and names <= _UNBORN):
        raise ConfigError(f"--workdir {path} is not empty and holds no run; give another folder")
    return True


def _bear(path: Path, config_json: str, journal: str) -> IO[str]:
    """Make a run where nothing is; returns its lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    born = Path(tempfile.mkdtemp(prefix=f".{path.name[:200]}.", dir=path.parent))
    lock: IO[str] | None = None
    try:
        born.chmod(0o777 & ~_umask())
        write_durably(born / "config.json", config_json)
        write_durably(born / "journal.json", journal)
        lock = _take_lock(born)
        disk.commit_point("born")
        try:
            born.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise BusyError(f"--workdir {path} was taken by another process just now; choose another folder") from error
            raise
        sync_folder(path.parent)
    except BaseException:
        if lock is not None:
            lock.close()
        shutil.rmtree(born, ignore_errors=True)
        raise
    return lock


def _fill(path: Path, config_json: str, journal: str) -> IO[str]:
    """Make a run of a folder, in place of the run that it may hold; returns its lock."""
    was_run = (path / "journal.json").exists()
    lock = _take_lock(path)
    try:
        # The old journal is the last to go, by the new one's rename: in between the folder is a damaged run, which can be overwritten.
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
            for name in ("journal.json", *_UNBORN):
                (path / name).unlink(missing_ok=True)
        lock.close()
        raise
    return lock


def _digest(body: dict[str, Any], config_sha256: str) -> str:
    content = json.dumps(body, sort_keys=True) + config_sha256
    return hashlib.sha256(content.encode()).hexdigest()


def _take_lock(folder: Path) -> IO[str]:
    """Open and lock `folder/lock`; the lock ends with the process, however that ends.

    A lock that is held is waited for, a few seconds.
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

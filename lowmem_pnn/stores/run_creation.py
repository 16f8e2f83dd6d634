"""Creation of a run's folder: whole or not at all, in the place of what an earlier run has left there, and locked by one process."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO

from lowmem_pnn.config.transformers_place import TOKENIZER_FILES
from lowmem_pnn.errors import BusyError, CheckpointError, ConfigError, DiskError
from lowmem_pnn.stores import disk
from lowmem_pnn.stores.disk import disk_error, open_regular, remove_folder, sync_folder, write_durably
from lowmem_pnn.stores.journal import DAMAGED, JOURNAL, REPLACED, older_commits

META_FOLDER = "meta"
"""Folder of a run with the run of its meta model."""
WORK_FOLDERS = ("weights", "activations", META_FOLDER)
"""Folders of a run that are there until it is done."""
TRANSFORMERS_FOLDER = "hf"
"""Folder of a run with the trained model as transformers loads it."""

ADAPTER_FOLDER = "adapter"
"""Folder of a run with adapters, in which it leaves them as peft has them."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Files in it, beside those of the tokenizer."""

LOGGER_FILE = "logger.json"
"""File in which a run with a logger notes what it is called there."""

TENSORBOARD_FOLDER = "tensorboard"
"""Folder of a run with TensorBoard's files."""

# Files that the creation of a run in an empty folder leaves behind when it is interrupted.
_FILES_BEFORE_JOURNAL = {"lock", "config.json", "config.json.new", "journal.json.new"}
# What a run consists of, beside its lock and its journals; what else lies in its folder is the user's.
_RESULTS = ("model.safetensors", "heads.safetensors", "result.json")
_FILES = ("config.json", "config.toml", "metrics.jsonl", "metrics.csv", "report.html", LOGGER_FILE, *_RESULTS)
_SCRATCH = re.compile(r"scratch\.[a-z0-9_]{8}")  # as `tempfile.mkdtemp` names it
# A temporary folder without a lock may be one that another process has made just now.
_ABANDONED_SECONDS = 600.0


def remove_unfinished(path: Path) -> None:
    """Delete what a process that was killed had not finished: files that were to be renamed, and scratch folders."""
    for name in (JOURNAL, *_FILES):
        (path / f"{name}.new").unlink(missing_ok=True)
    for folder in path.iterdir():
        if _SCRATCH.fullmatch(folder.name) and not folder.is_symlink():
            remove_folder(folder)


def is_usable_folder(path: Path, overwrite: bool) -> bool:
    """Decide whether a path is a folder already; raise if it is one that may not become a run."""
    if not path.is_dir():
        if path.exists():
            raise ConfigError(f"--workdir {path} is a file; give a folder")
        return False
    names = {entry.name for entry in path.iterdir()}
    if JOURNAL in names:
        if not overwrite:
            raise ConfigError(
                f"--workdir {path} holds a run already; give --resume to go on with it, or --overwrite to replace it"
            )
    elif names and not ("lock" in names and names <= _FILES_BEFORE_JOURNAL):
        raise ConfigError(f"--workdir {path} is not empty and holds no run; give another folder")
    return True


def create_and_rename(path: Path, config_json: str, journal: str) -> IO[str]:
    """Create a run where nothing is, under another name first; return its lock."""
    new_parents = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(path), dir=path.parent))
    lock: IO[str] | None = None
    try:
        lock = take_lock(temporary)
        temporary.chmod(0o777 & ~_umask())
        write_durably(temporary / "config.json", config_json)
        write_durably(temporary / JOURNAL, journal)
        disk.commit_point("born")
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise BusyError(f"--workdir {path} was taken by another process just now; choose another folder") from error
            raise
        for folder in (path.parent, *(place.parent for place in new_parents)):
            sync_folder(folder)
    except BaseException:
        if lock is not None:
            lock.close()
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return lock


def create_in_folder(path: Path, config_json: str, journal: str) -> IO[str]:
    """Make a folder a run, in place of the run that it may hold; return its lock."""
    was_run = os.path.lexists(path / JOURNAL)
    lock = take_lock(path)
    try:
        if was_run:
            _mark_as_replaced(path)
        # The old journal goes last, by the new one's rename: in between the folder is no whole run, and can be overwritten.
        _remove_run(path)
        write_durably(path / "config.json", config_json)
        disk.commit_point("emptied")
        write_durably(path / JOURNAL, journal)
    except BaseException:
        if not was_run:
            with contextlib.suppress(OSError):
                for name in (JOURNAL, *_FILES_BEFORE_JOURNAL):
                    (path / name).unlink(missing_ok=True)
        lock.close()
        raise
    return lock


def _mark_as_replaced(path: Path) -> None:
    """Have a run's journal say that it is being replaced, on the drive, before the first of its files goes.

    Deletions reach a drive in any order: after a loss of power a run that has finished could lack its log, and look whole.
    """
    for older, _ in older_commits(path)[0]:
        older.unlink()
    # A disk that is full has no room for it until the run's files are gone; then the order of deletions has to do.
    with contextlib.suppress(DiskError):
        write_durably(path / JOURNAL, REPLACED)


def delete_run(path: Path) -> None:
    """Delete a run that nobody works in any more; its folder too, unless something else lies in it.

    Args:
        path: Path of the run's directory.

    Raises:
        OSError: The file system refused.
    """
    _remove_run(path)
    for name in (JOURNAL, "lock"):
        (path / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()
    sync_folder(path.parent)


def _remove_run(path: Path) -> None:
    """Delete what a run consists of, but for its lock and its last journal; what else is there is the user's, exports too."""
    for older, _ in older_commits(path)[0]:
        older.unlink()
    remove_unfinished(path)
    for name in _FILES:
        (path / name).unlink(missing_ok=True)
    for place, ours in ((ADAPTER_FOLDER, (*ADAPTER_FILES, *TOKENIZER_FILES)), (TENSORBOARD_FOLDER, ("events.out.tfevents.*",))):
        folder = path / place
        if folder.is_dir() and not folder.is_symlink():
            for file in [file for pattern in ours for file in folder.glob(pattern)]:
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what else lies there is the user's
                folder.rmdir()
    for name in (*WORK_FOLDERS, TRANSFORMERS_FOLDER):
        folder = path / name
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        elif folder.is_symlink():
            folder.unlink()
    sync_folder(path)


def _temporary_prefix(path: Path) -> str:
    return f".{path.name[:200]}."


def _remove_abandoned(path: Path) -> None:
    """Delete the temporary folders of earlier creations of a run, whose processes were killed."""
    pattern = re.compile(re.escape(_temporary_prefix(path)) + "[a-z0-9_]{8}")  # as `tempfile.mkdtemp` names it
    for folder in path.parent.iterdir():
        if not pattern.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError, CheckpointError):
            names = {entry.name for entry in folder.iterdir()}
            if not names <= {JOURNAL, *_FILES_BEFORE_JOURNAL}:
                continue
            if "lock" not in names:
                if not names and time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                    folder.rmdir()
                continue
            with os.fdopen(open_regular(folder / "lock", os.O_RDWR, remedy=DAMAGED), "r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_folder(folder)


# A worker that was killed may hold the lock until the kernel has taken its memory back.
_LOCK_PATIENCE_SECONDS = 3.0


def take_lock(folder: Path) -> IO[str]:
    """Open and lock `folder/lock`, after a few seconds if another process holds it.

    The lock ends with the process, however the process ends.
    """
    try:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        lock = os.fdopen(open_regular(folder / "lock", flags, remedy=DAMAGED), "a+", encoding="utf-8")
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

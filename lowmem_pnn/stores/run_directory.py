"""Run directory: created complete, locked by one process, moved from commit to commit by its journal.

    RUN/
      config.json           the configuration
      journal.json          the last commit: plan, position, names and hashes of the files that belong to it
      journal.000041.json   an older commit, where more than one is kept
      metrics.jsonl         a line per logged step; what a commit does not cover is cut off at resume
      metrics.csv           the same lines as a table, written when the run stops or is done
      lock                  held by the process that works here
      weights/ activations/ scratch.XXXXXXXX/ deleted when the run is done
      meta/                 the run of the meta model (--method incubate), deleted with them
      model.safetensors result.json
      hf/                   the trained model as transformers loads it, of a model of transformers
      adapter/              of a run with adapters: what it has learnt, as peft has it

A commit: new bytes lie in files of their own, on the drive; then the journal is written under another name, synced, and renamed; then
files that no journal names are deleted. What is not in the journal did not happen. A folder without a journal is no run.
"""

import contextlib
import difflib
import hashlib
import io
import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lowmem_pnn.config.code import command_to_resume, python_objects
from lowmem_pnn.errors import CheckpointError, DiskError
from lowmem_pnn.stores.disk import (
    disk_error,
    open_regular,
    read_file,
    refuse_link,
    remove_folder,
    sync_file,
    sync_folder,
    write_durably,
)
from lowmem_pnn.stores.journal import DAMAGED, JOURNAL, last_whole_commit, older_commits, older_name, read_journal, seal_journal
from lowmem_pnn.stores.run_creation import (
    WORK_FOLDERS,
    create_and_rename,
    create_in_folder,
    is_usable_folder,
    remove_unfinished,
    take_lock,
)


class RunDirectory:
    """Run directory whose lock this process holds.

    Made by `create` or `open`; used as a context, which frees the lock.

    Args:
        path: Path of the directory.
        lock: Open lock file; the reason where the run can only be read.
        config_sha256: SHA-256 of the configuration's text.
    """

    def __init__(self, path: Path, lock: IO[str] | DiskError, config_sha256: str) -> None:
        self.path = path
        self._lock = lock
        self._config_sha256 = config_sha256
        self._metrics: io.FileIO | None = None
        self._durable_names: set[str] = set()

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
            create = create_in_folder if is_usable_folder(path, overwrite) else create_and_rename
            return cls(path, create(path, config_json, seal_journal(journal, digest)), digest)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DiskError(f"cannot make --workdir {path}: {reason}; choose a folder that can be written") from error

    @classmethod
    def open(cls, path: Path, *, to_read: bool = False, instead: str = "") -> "RunDirectory":
        """Open an existing run, and lock it.

        Args:
            path: Path of the directory.
            to_read: Whether a run in a place that cannot be written to is opened too, without a lock.
            instead: What else to do where no run is there: words for the message.

        Raises:
            CheckpointError: There is no run, its journal is damaged, or a link is in the place of something that is written.
            BusyError: Another process works in the run.
            DiskError: The directory cannot be written to.
        """
        try:
            is_run = os.path.lexists(path / JOURNAL)
        except OSError as error:
            raise disk_error(path, error, "look into it") from error
        if not is_run:
            raise CheckpointError(f"{path} holds no run; give the folder of one{_run_near(path)}{instead}{way_back(path)}")
        lock: IO[str] | DiskError
        try:
            lock = take_lock(path)
        except DiskError as error:
            if not to_read:
                raise
            lock = error
        try:
            for name in WORK_FOLDERS:
                refuse_link(path / name, DAMAGED)
            try:
                config_sha256 = read_journal(path / JOURNAL)[1]
            except CheckpointError as error:
                raise CheckpointError(f"{error}{way_back(path)}") from None
            return cls(path, lock, config_sha256)
        except BaseException:
            _close(lock)
            raise

    @property
    def is_writable(self) -> bool:
        """Whether the process holds the lock, and can write to the folder."""
        return not isinstance(self._lock, DiskError) and os.access(self.path, os.W_OK)

    def check_writable(self) -> None:
        """Refuse a run that was opened to be read, and that has to be written to.

        Raises:
            DiskError: The lock could not be taken.
        """
        if isinstance(self._lock, DiskError):
            raise self._lock

    def config_json(self) -> str:
        """Return the configuration's text, compared with its checksum in the journal.

        Raises:
            CheckpointError: The configuration is missing, or was changed.
        """
        return read_config(self.path, self._config_sha256)

    def journal(self) -> dict[str, Any]:
        """Return the body of the last commit's journal."""
        return read_journal(self.path / JOURNAL)[0]

    def older_journals(self) -> list[dict[str, Any]]:
        """Return the bodies of the kept journals before the last one, newest first; damaged ones are left out."""
        return [body for _, body in older_commits(self.path, self._config_sha256)[0]]

    def damaged_journals(self) -> list[Path]:
        """Return the files that have the name of an older commit, and hold none of this run."""
        return older_commits(self.path, self._config_sha256)[1]

    def commit(self, journal: dict[str, Any], keep: int = 1) -> list[dict[str, Any]]:
        """Move to a new commit. The files that its journal names must be on the drive, in folders that are, but for the run's own.

        Args:
            journal: Body of the journal, JSON-able, with `number`, one higher than in the last one.
            keep: Number of commits to keep, this one included.

        Returns:
            The bodies of the kept journals, newest first: files that none of them names can be deleted.

        Raises:
            DiskError: The disk is full or not writable; the last commit stands.
        """
        current = self.path / JOURNAL
        try:
            if keep > 1:
                # A copy by link: the rename below then replaces the name, not the bytes.
                previous = self.path / older_name(read_journal(current)[0]["number"])
                if not os.path.lexists(previous):
                    try:
                        os.link(current, previous)
                    except OSError:  # a file system without links, whatever it says of them
                        write_durably(previous, read_file(current, DAMAGED))
            self._sync_what_a_journal_counts_on()
            # Newer ones than this are of before somebody went back to an older one by hand.
            for path, left in older_commits(self.path, self._config_sha256)[0]:
                if left["number"] >= journal["number"]:
                    path.unlink()
            write_durably(current, seal_journal(journal, self._config_sha256))
            older = older_commits(self.path, self._config_sha256)[0]
            for path, _ in older[keep - 1 :]:
                path.unlink()
            if older[keep - 1 :] and journal.get("stage") == "done":
                # No later commit would bring it to the drive that they are gone.
                sync_folder(self.path)
        except OSError as error:
            raise disk_error(current, error, "commit to it") from error
        return [journal, *(body for _, body in older[: keep - 1])]

    def _sync_what_a_journal_counts_on(self) -> None:
        """Bring the lines of `metrics.jsonl` to the drive, and its name and those of the work folders, which may be new."""
        if self._metrics is not None:
            sync_file(self.path / "metrics.jsonl", self._metrics.fileno())
        names = {name for name in ("metrics.jsonl", *WORK_FOLDERS) if os.path.lexists(self.path / name)}
        if names - self._durable_names:
            sync_folder(self.path)
            self._durable_names = names

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`.

        Raises:
            DiskError: The disk is full or not writable.
        """
        path = self.path / "metrics.jsonl"
        try:
            if self._metrics is None:
                flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
                # Unbuffered: a buffered line that a full disk refused would be refused once more when the file is closed.
                self._metrics = io.FileIO(open_regular(path, flags, remedy=DAMAGED), "ab")
            content = (json.dumps(line) + "\n").encode()
            while content:  # a disk that is nearly full takes a part
                content = content[self._metrics.write(content) :]
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
                with os.fdopen(open_regular(path, os.O_RDWR, remedy=DAMAGED), "r+b") as file:
                    file.truncate(size)
            except OSError as error:
                raise disk_error(path, error, "cut it") from error

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Make a folder for work that leaves nothing: in the run, or, where that cannot be written to, among temporary files.

        Raises:
            DiskError: The folder cannot be made.
        """
        place = self.path if self.is_writable else Path(tempfile.gettempdir())
        try:
            folder = Path(tempfile.mkdtemp(prefix="scratch.", dir=place))
        except OSError as error:
            raise disk_error(place / "scratch", error, "make a folder for it") from error
        try:
            yield folder
        finally:
            remove_folder(folder)

    def clear(self) -> None:
        """Delete the working files of a run that is done, and the older commits, which need them, as far as they can be deleted.

        Its weights with the optimizer's state stay where the options say so (`keep_state`).
        """
        if not self.is_writable:
            return
        with contextlib.suppress(OSError, DiskError):
            for path, _ in older_commits(self.path, self._config_sha256)[0]:
                path.unlink(missing_ok=True)
            remove_unfinished(self.path)
            keeps_state = json.loads(self.config_json()).get("keep_state") is True
            for name in WORK_FOLDERS:
                if name != "weights" or not keeps_state:
                    remove_folder(self.path / name)
            sync_folder(self.path)

    def disk_bytes(self) -> int:
        """Return the bytes that the run takes on disk now; a file with two names is counted once."""
        sizes: dict[int, int] = {}
        for folder, _, names in os.walk(self.path):
            for name in names:
                # Another thread may delete it meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    found = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - called for every commit
                    sizes[found.st_ino] = found.st_blocks * 512
        return sum(sizes.values())

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        _close(self._lock)


def read_config(folder: Path, config_sha256: str) -> str:
    """Return the text of a run's configuration, compared with its checksum in the journal.

    Args:
        folder: Path of the run's directory.
        config_sha256: SHA-256 of the text.

    Raises:
        CheckpointError: The configuration is missing, or was changed.
        DiskError: The file system refused.
    """
    path = folder / "config.json"
    try:
        content = read_file(path, DAMAGED)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path}: {(error.strerror or str(error)).lower()}; {DAMAGED}") from error
    except OSError as error:
        raise disk_error(path, error, "read it") from error
    if hashlib.sha256(content).hexdigest() != config_sha256:
        raise CheckpointError(f"{path} is not the configuration that the run began with; {DAMAGED}")
    return content.decode(errors="replace")


def _run_near(path: Path) -> str:
    """Return the run beside a folder whose name is the nearest, for a message; nothing where none is near."""
    try:
        runs = [folder.name for folder in path.parent.iterdir() if (folder / JOURNAL).is_file()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, runs, n=1)
    return f", such as {path.parent / near[0]}" if near else ""


def way_back(path: Path) -> str:
    """Return how to go on from the newest older commit of a run whose last one is damaged: the end of a message, or nothing.

    Args:
        path: Path of the run's directory.
    """
    try:
        older = last_whole_commit(path)
    except OSError:
        older = None
    if older is None:
        return ""
    copy = shlex.join(["cp", str(older), str(path / JOURNAL)])
    options = _options_of(path)
    return f"; or go back to the commit before: {copy}{', then' if python_objects(options) else ' &&'} {command_to_resume(options, path)}"


def _options_of(path: Path) -> dict[str, Any]:
    """Return the options of a run, as far as they can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError, CheckpointError):
        content = json.loads(read_file(path / "config.json", DAMAGED))
        return content if isinstance(content, dict) else {}
    return {}


def _close(lock: IO[str] | DiskError) -> None:
    if not isinstance(lock, DiskError):
        lock.close()

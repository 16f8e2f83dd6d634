"""Cuts the power during small trainings: what a drive may then hold is made from the recorded changes to files, and resumed.

    cd tests && python -m trials.power_loss FOLDER SUBSETS SEED [RECORDING...]

A training is run once, and every change to its files and every sync is recorded. Then, for each point between two changes, the folder is
made as a drive may hold it: with all changes that were not synced, with none of them, with each one alone missing; and, at random points,
with random subsets of them. Of a file nothing is sure before it is synced, and of a name nothing before its folder is: changes of both
kinds come and go in any order, by pages of 4096 bytes, and a file's size apart from its bytes.

Each distinct folder is resumed in a fork of this process. Either it ends as the run that was left alone, or it says in one line why not.
With SUBSETS below 0 no random subsets are made, and that many folders, without the sign, are drawn from the others. Prints a table, then
one JSON line.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest import mock

from lowmem_pnn.errors import LowMemError, Stopped
from lowmem_pnn.training import start
from trials.trainings import TRAININGS, Training, differences, in_child, prepare

_PAGE = 4096
_CHANGING = (
    "open", "write", "writev", "pwrite", "pwritev", "truncate", "ftruncate", "posix_fallocate", "copy_file_range", "sendfile",
    "rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir",
)  # fmt: skip
_SYNCING = ("fsync", "fdatasync")

Folders = dict[int, dict[str, int]]
"""Names in folders, by number of the folder: the number of what is there. Number 0 is the folder that is watched."""
Files = dict[int, bytes]
"""Content of files, by number."""


@dataclass(frozen=True)
class Change:
    """One change that reaches the drive as a whole, or not at all.

    Args:
        files: numbers of the files and folders that have to be synced for it to be sure.
        kind: `size`, `bytes`, `enter`, `leave`, `rename`; no changes are `sync`, and `begin`, before which all is synced.
        details: of this kind.
    """

    kind: str
    files: tuple[int, ...]
    details: tuple[Any, ...] = ()

    def apply_to_content(self, content: bytearray) -> None:
        """Change the content of the file, if it is that which changes."""
        if self.kind == "size":
            (size,) = self.details
            del content[size:]
            content.extend(bytes(size - len(content)))
        elif self.kind == "bytes":
            offset, data = self.details
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data

    def apply_to_names(self, folders: Folders) -> None:
        """Change names in folders, if it is these that change."""
        names = folders.setdefault(self.files[0], {}) if self.kind in ("enter", "leave", "rename") else {}
        if self.kind == "leave":
            names.pop(self.details[0], None)
        elif self.kind == "enter":
            name, number, is_folder = self.details
            names[name] = number
            if is_folder:
                folders.setdefault(number, {})
        elif self.kind == "rename":
            before, name, number, is_folder = self.details
            if names.get(before) == number:
                del names[before]
            folders.setdefault(self.files[1], {})[name] = number
            if is_folder:
                folders.setdefault(number, {})


class Recorder:
    """Records what happens to the files in a folder, as long as it is active.

    It looks at all files after every call that may change some: so it sees every change, those too that are made by other means.

    Args:
        root: folder that is watched.
    """

    def __init__(self, root: Path) -> None:
        self.changes: list[Change] = []
        self._root = root
        self._lock = threading.RLock()
        self._numbers: dict[int, int] = {root.stat().st_ino: 0}  # by the system's, as long as they are in the folder
        self._count = 0
        self._folders: Folders = {0: {}}
        self._files: Files = {}
        self._open = os.open
        self._note()
        self.changes.append(Change("begin", (0,)))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Record."""
        with mock.patch.multiple(
            os,
            **{name: self._changing(getattr(os, name)) for name in _CHANGING if hasattr(os, name)},
            **{name: self._syncing(getattr(os, name)) for name in _SYNCING},
        ):
            yield
        self._note()

    def _changing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def change(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                try:
                    return call(*arguments, **options)
                finally:
                    self._note()

        return change

    def _syncing(self, call: Callable[[int], None]) -> Callable[[int], None]:
        @wraps(call)
        def sync(descriptor: int) -> None:
            with self._lock:
                self._note()
                call(descriptor)
                number = self._numbers.get(os.fstat(descriptor).st_ino)
                if number is not None:
                    self.changes.append(Change("sync", (number,)))

        return sync

    def _note(self) -> None:
        """Record in what files and folders differ from how they were last seen."""
        seen: dict[int, int] = {self._root.stat().st_ino: 0}
        folders: Folders = {0: {}}
        files: Files = {}
        self._look(self._root, 0, seen, folders, files)
        for number, content in files.items():
            self._note_content(number, self._files.get(number, b""), content)
        names = [
            {(folder, name): number for folder, entries in one.items() for name, number in entries.items()}
            for one in (self._folders, folders)
        ]
        gone = {place: number for place, number in names[0].items() if names[1].get(place) != number}
        come = {place: number for place, number in names[1].items() if names[0].get(place) != number}
        for (folder, name), number in come.items():
            origin = next((place for place, other in gone.items() if other == number and place not in names[1]), None)
            if origin is None:
                self.changes.append(Change("enter", (folder,), (name, number, number in folders)))
            else:
                del gone[origin]
                self.changes.append(Change("rename", (origin[0], folder), (origin[1], name, number, number in folders)))
        for folder, name in gone:
            if (folder, name) not in come:
                self.changes.append(Change("leave", (folder,), (name,)))
        self._numbers, self._folders, self._files = seen, folders, files

    def _look(self, path: Path, folder: int, seen: dict[int, int], folders: Folders, files: Files) -> None:
        for entry in os.scandir(path):
            inode = entry.inode()
            if inode not in seen:
                if inode in self._numbers:
                    seen[inode] = self._numbers[inode]
                else:
                    self._count += 1
                    seen[inode] = self._count
            number = folders[folder][entry.name] = seen[inode]
            if entry.is_dir(follow_symlinks=False):
                folders[number] = {}
                self._look(Path(entry.path), number, seen, folders, files)
            elif number not in files:
                files[number] = _read(self._open, entry.path)

    def _note_content(self, number: int, before: bytes, after: bytes) -> None:
        if len(before) != len(after):
            self.changes.append(Change("size", (number,), (len(after),)))
        before = before[: len(after)].ljust(len(after), b"\0")
        for offset in range(0, len(after), _PAGE):
            piece = slice(offset, offset + _PAGE)
            if before[piece] != after[piece]:
                self.changes.append(Change("bytes", (number,), (offset, after[piece])))


def _read(open_: Callable[..., int], path: str) -> bytes:
    descriptor = open_(path, os.O_RDONLY)
    try:
        return os.read(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


Tree = dict[str, bytes | None]
"""Content of a folder: bytes of files by path, None for folders."""


def names_of(changes: Iterable[Change]) -> dict[str, int | None]:
    """Return the paths in the folder that is watched, after changes to it while it was empty: numbers of files, None for folders."""
    folders: Folders = {0: {}}
    for change in changes:
        change.apply_to_names(folders)
    names: dict[str, int | None] = {}

    def visit(number: int, path: str) -> None:
        for name, inner in folders[number].items():
            names[path + name] = None if inner in folders else inner
            if inner in folders:
                visit(inner, f"{path}{name}/")

    visit(0, "")
    return names


def tree_of(changes: list[Change]) -> Tree:
    """Return the content of the folder that is watched, after changes to it while it was empty."""
    files: dict[int, bytearray] = defaultdict(bytearray)
    for change in changes:
        change.apply_to_content(files[change.files[0]])
    return {path: None if number is None else bytes(files[number]) for path, number in names_of(changes).items()}


class Digests:
    """What tells trees apart, of many that are much the same."""

    def __init__(self) -> None:
        self._contents: dict[tuple[int, ...], bytes] = {}

    def of(self, changes: list[Change]) -> bytes:
        """Return the digest of the tree that changes make."""
        made: dict[int, list[Change]] = defaultdict(list)
        for change in changes:
            if change.kind in ("size", "bytes"):
                made[change.files[0]].append(change)
        names = {path: number and self._content(made[number]) for path, number in names_of(changes).items()}
        return hashlib.sha256(repr(sorted(names.items())).encode()).digest()

    def _content(self, changes: list[Change]) -> bytes:
        key = tuple(map(id, changes))
        if key not in self._contents:
            content = bytearray()
            for change in changes:
                change.apply_to_content(content)
            self._contents[key] = hashlib.sha256(content).digest()
        return self._contents[key]


def tree_in(root: Path) -> Tree:
    """Return the content of a folder."""
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")}


def write_tree(tree: Tree, root: Path) -> None:
    """Make a folder with a content."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in sorted(tree.items()):
        if content is None:
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).write_bytes(content)


def losses(changes: list[Change], subsets: int, chance: random.Random) -> Iterator[tuple[str, list[Change]]]:
    """Give what may have reached the drive when the power goes, with words for it.

    Args:
        changes: all changes and syncs, in order; those before the first `begin` are sure.
        subsets: random subsets.
        chance: draws them.
    """
    begin = next(number for number, change in enumerate(changes) if change.kind == "begin")
    unsure: dict[int, list[int]] = {}  # after so many changes: those that are not synced
    missing: dict[int, set[int]] = {}  # of a change that is not synced: the files for which it waits
    for number, change in enumerate(changes[begin:], begin):
        unsure[number] = list(missing)
        if change.kind == "sync":
            for files in missing.values():
                files.discard(change.files[0])
            missing = {waiting: files for waiting, files in missing.items() if files}
        elif change.kind != "begin":
            missing[number] = set(change.files)
    unsure[len(changes)] = list(missing)

    def without(stop: int, dropped: set[int]) -> list[Change]:
        return [change for number, change in enumerate(changes[:stop]) if number not in dropped]

    for stop, waiting in unsure.items():
        yield f"{stop}: all", without(stop, set())
        yield f"{stop}: none", without(stop, set(waiting))
        for number in waiting:
            yield f"{stop}: without {number}", without(stop, {number})
    points = [stop for stop, waiting in unsure.items() if len(waiting) > 1]
    for _ in range(subsets):
        stop, share = chance.choice(points), chance.random()
        dropped = {number for number in unsure[stop] if chance.random() < share}
        yield f"{stop}: without {sorted(dropped)}", without(stop, dropped)


@dataclass(frozen=True)
class Recording:
    """A training whose files are watched.

    Args:
        words: what happens in it.
        training: what is trained.
        stops: asked to stop, and resumed: after so many batches; 0 for a run that goes through.
        overwrites: whether it replaces a run that has finished.
    """

    words: str
    training: Training
    stops: int = 0
    overwrites: bool = False

    def perform(self, root: Path) -> list[Change]:
        """Run it, and return what happened to the files in a folder.

        Args:
            root: the folder, which is empty; the run is in a folder in it.
        """
        path = root / "runs" / "run"
        if self.overwrites:
            self.training.run(path)
        recorder = Recorder(root)
        with recorder.active():
            if self.stops:
                asked = 0

                def should_stop() -> bool:
                    nonlocal asked
                    asked += 1
                    return asked > self.stops

                run_to_end = start.run_to_end
                with mock.patch.object(
                    start, "run_to_end", lambda session, *rest: run_to_end(replace(session, should_stop=should_stop), *rest)
                ):
                    try:
                        self.training.run(path)
                    except Stopped:
                        pass
                    else:
                        raise AssertionError("it was to stop")
            self.training.run(path, resume=self.stops > 0, overwrite=self.overwrites)
        assert tree_of(recorder.changes) == tree_in(root), "what was recorded is not what happened"
        return recorder.changes


def _small(name: str, **options: Any) -> Training:
    """A training with two batches, the second of them short."""
    training = TRAININGS[name]
    return replace(
        training,
        data=lambda count, seed=0: training.data(13 if count > 10 else 4, seed=seed),
        options={**training.options, **options},
    )


RECORDINGS = {
    "pnn": Recording(
        "pnn with a recovery epoch, `--keep-commits 2`, stopped and resumed",
        _small("pnn", epochs=1, recovery_epochs=1, keep_commits=2, compare=False),
        stops=3,
    ),
    "exact": Recording(
        "exact, clipped, in the place of a run that has finished", _small("exact, fp16", clip_norm=0.5), overwrites=True
    ),
    "neuroflux": Recording(
        "neuroflux, interleaved, its heads among the results",
        _small("pnn", epochs=1, method="neuroflux", visits="interleaved", macro_batches=1, clip_norm=0.5, keep_commits=1),
    ),
}
"""Recordings by name."""


def resume(training: Training, path: Path, reference: Path) -> str:
    """Go on with what is left of a run; what came of it, in a word, with details after a colon."""
    began = False
    try:
        try:
            training.run(path, resume=True)
        except LowMemError as error:
            if "holds no run" not in str(error):
                raise
            began = True
            training.run(path)
    except LowMemError as error:
        text = str(error)
        return f"refused: {text}" if len(text.splitlines()) == 1 else f"failed: several lines: {text}"
    found = differences(path, reference)
    return f"failed: {'; '.join(found)}" if found else "begun" if began else "resumed"


@dataclass
class Tally:
    """What came of the losses of one recording."""

    changes: int = 0
    losses: int = 0
    folders: int = 0
    resumed: int = 0
    begun: int = 0
    refused: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def try_recording(recording: Recording, folder: Path, subsets: int, chance: random.Random) -> Tally:
    """Record a training, and resume what may be left of it.

    Args:
        recording: what is recorded.
        folder: folder to work in.
        subsets: random subsets; below 0, folders that are tried of all, without the sign.
        chance: draws them.
    """
    prepare(recording.training)
    reference, watched, log = folder / "reference", folder / "watched", folder / "log"
    assert in_child(partial(recording.training.run, reference)) == 0, "the run that is left alone fails"
    watched.mkdir()
    changes: list[Change] = []

    def record() -> None:
        log.write_text(repr(recording.perform(watched)))

    assert in_child(record) == 0, "the run that is recorded fails"
    changes = eval(log.read_text(), {"Change": Change})
    tally, digests = Tally(changes=sum(change.kind not in ("sync", "begin") for change in changes)), Digests()
    found: dict[bytes, tuple[str, list[Change]]] = {}
    for words, kept in losses(changes, max(subsets, 0), chance):
        tally.losses += 1
        found.setdefault(digests.of(kept), (words, kept))
    chosen = list(found.values())
    print(f"{len(found)} distinct folders", file=sys.stderr)
    if subsets < 0:
        chosen = chance.sample(chosen, min(-subsets, len(chosen)))
    tally.folders = len(chosen)
    outcomes: Counter[str] = Counter()
    for words, kept in chosen:
        write_tree(tree_of(kept), watched)
        log.write_text("")
        code = in_child(
            lambda: (log.write_text(resume(recording.training, watched / "runs" / "run", reference)), None)[1],
            lambda trace: (log.write_text(f"failed: {trace}"), None)[1],
        )
        outcome = log.read_text() if code in (0, 1) else f"failed: it died of {code}"
        kind, _, details = outcome.partition(": ")
        outcomes[kind] += 1
        if kind == "failed":
            tally.failed.append(f"{words}: {details}")
        elif kind == "refused":
            tally.refusals[details] = tally.refusals.get(details, 0) + 1
    tally.resumed, tally.begun, tally.refused = (outcomes[kind] for kind in ("resumed", "begun", "refused"))
    return tally


def main() -> None:
    """Run the trials."""
    folder, subsets, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    names = sys.argv[4:] or list(RECORDINGS)
    tallies: dict[str, Tally] = {}
    print(
        "| run | changes | losses | distinct folders | resumed, identical | not begun, begun anew, identical | refused in one line | wrong |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for number, name in enumerate(names):
        place = folder / str(number)
        place.mkdir(parents=True)
        tallies[name] = tally = try_recording(RECORDINGS[name], place, subsets, random.Random(seed))
        counts = (tally.changes, tally.losses, tally.folders, tally.resumed, tally.begun, tally.refused, len(tally.failed))
        print(f"| {RECORDINGS[name].words} | {' | '.join(map(str, counts))} |", flush=True)
        shutil.rmtree(place)
    print(json.dumps({name: tally.__dict__ for name, tally in tallies.items()}))


if __name__ == "__main__":
    main()

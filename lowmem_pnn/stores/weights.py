"""Weights, buffers and optimizer state of a model on disk: a file per partition, in generations.

    FOLDER/
      p003.g000012.safetensors   partition 3, generation 12: tensors 'weight/NAME' and 'optimizer/NAME/STATE'
      rest.g0.safetensors        tensors of the model that no partition uses

A file of the last commit is never written to: changes go to a *working* file of the next generation. `freeze` ends its being
written to, and `seal` makes it the committed one once it is on the drive; meanwhile the next working file may be begun. Which files
are committed is for the run's journal to say: the store tells it, and then believes nothing else.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.memory.aligned import HostAllocator
from lowmem_pnn.stores import disk
from lowmem_pnn.stores.disk import IoCounter, disk_error, outgrows_page_cache, sha256, sync_folder
from lowmem_pnn.stores.header import TensorLayout
from lowmem_pnn.stores.keys import FORMAT, REMEDY, WEIGHT_FILE, PartitionName, Sealed, parse_name, parse_state, weight_key
from lowmem_pnn.stores.tensor_file import TensorFile

PartitionLayout = Mapping[str, TensorLayout]
"""Element type and shape of every tensor of a partition, by its name in the file (`weight_key`, `state_key`)."""


class WeightStore:
    """The weight files of a run. Make one with `create`, come back to one with `open`.

    The methods may be called from several threads. Every `reader` and `writer` is a handle of its caller's own, closed by it.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = WeightStore.create(Path(folder.name), [{"weight/0.bias": (torch.float32, (2,))}])
        >>> with store.writer(0) as file:
        ...     file.write_from("weight/0.bias", torch.tensor([1.0, 2.0]))
        >>> state = store.seal([0])
        >>> with WeightStore.open(Path(folder.name), state).reader(0) as file:
        ...     file.read("weight/0.bias").tolist()
        [1.0, 2.0]
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: Path,
        layouts: dict[PartitionName, dict[str, TensorLayout]],
        committed: dict[PartitionName, Sealed],
        counter: IoCounter | None,
    ) -> None:
        self.folder = folder
        self._layouts = layouts
        self._committed = committed
        self._counter = counter
        self._direct = outgrows_page_cache(2 * sum(_nbytes(layout) for layout in layouts.values()))
        self._homes = {key: partition for partition, layout in layouts.items() for key in layout}
        self._lock = threading.RLock()
        # One handle stays open from a working file's birth to its seal: only that is sure to be told of a failed write-back.
        self._working: dict[PartitionName, TensorFile] = {}
        # Files that were working ones until `freeze`, and are not yet on the drive.
        self._frozen: dict[PartitionName, TensorFile] = {}
        self._generations: dict[PartitionName, int] = {}
        for path in self._files():
            partition, generation = parse_name(path.name)
            self._generations[partition] = max(generation, self._generations.get(partition, -1))
        weakref.finalize(self, _close_all, self._working)
        weakref.finalize(self, _close_all, self._frozen)

    @classmethod
    def create(
        cls,
        folder: Path,
        partitions: Sequence[PartitionLayout],
        counter: IoCounter | None = None,
        *,
        rest: PartitionLayout | None = None,
    ) -> WeightStore:
        """Begin a store that holds nothing yet: write each partition, and the rest, and seal them.

        Args:
            folder: made if it is not there. Weight files in it are deleted: no journal names them.
            partitions: the tensors of each.
            counter: counts the bytes read and written.
            rest: the tensors that no partition uses, if there are any: partition 'rest'.

        Raises:
            DiskError: the folder cannot be made or emptied.
        """
        folder = Path(folder)
        layouts: dict[PartitionName, dict[str, TensorLayout]] = {k: dict(layout) for k, layout in enumerate(partitions)}
        if rest:
            layouts["rest"] = dict(rest)
        assert len({key for layout in layouts.values() for key in layout}) == sum(map(len, layouts.values())), "each has one home"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if WEIGHT_FILE.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise disk_error(folder, error, "make an empty folder") from error
        return cls(folder, layouts, {}, counter)

    @classmethod
    def open(
        cls,
        folder: Path,
        state: Mapping[str, Any],
        verify: bool = True,
        counter: IoCounter | None = None,
        *,
        keep: Iterable[Mapping[str, Any]] = (),
    ) -> WeightStore:
        """Come back to a store as a commit left it; weight files that no given state names are deleted.

        Args:
            folder: of the store.
            state: of the commit, as `seal` returned it.
            verify: compare every file's hash: reads them all.
            counter: counts the bytes read and written.
            keep: states of other commits, whose files are left alone (and unchecked).

        Raises:
            CheckpointError: a file is missing, of another size, in another's place, not in the format, or (with `verify`) was
                changed in any byte. The text names the file. Nothing is deleted then.
            DiskError: the file system refused.
        """
        folder = Path(folder)
        layouts: dict[PartitionName, dict[str, TensorLayout]] = {}
        committed = parse_state(folder, state)
        for partition, sealed in committed.items():
            path = folder / sealed.file
            with TensorFile.open(path, counter=counter, remedy=REMEDY) as file:
                layouts[partition] = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
                if file.size != sealed.bytes:
                    raise CheckpointError(f"{str(path)!r} has {file.size} bytes, the journal says {sealed.bytes}; {REMEDY}")
                if (held := file.metadata.get("file")) != sealed.file:
                    raise CheckpointError(f"{str(path)!r} holds what was written as {held!r}; {REMEDY}")
            if verify and (digest := sha256(path, counter)) != sealed.sha256:
                raise CheckpointError(f"{str(path)!r} has sha256 {digest}, the journal says {sealed.sha256}; {REMEDY}")
        self = cls(folder, layouts, committed, counter)
        self.discard_obsolete([state, *keep])
        return self

    @property
    def num_partitions(self) -> int:
        """Without the rest."""
        return len(self._layouts) - ("rest" in self._layouts)

    def layout(self, partition: PartitionName) -> dict[str, TensorLayout]:
        """Element type and shape of a partition's tensors, by name in the file."""
        return dict(self._layouts[partition])

    def home(self, key: str) -> PartitionName:
        """The partition whose file holds a tensor.

        Raises:
            CheckpointError: none does.
        """
        if key not in self._homes:
            raise CheckpointError(f"{str(self.folder)!r} holds no tensor {key!r}; {REMEDY}")
        return self._homes[key]

    def nbytes(self, key: str) -> int:
        """Of a tensor.

        Raises:
            CheckpointError: no file holds it.
        """
        return _nbytes({key: self._layouts[self.home(key)][key]})

    def state(self) -> dict[str, Any]:
        """What the journal must say to come back to the committed files: JSON-able; None for what was never sealed."""
        with self._lock:
            named = {partition: asdict(sealed) for partition, sealed in self._committed.items()}
        numbers = range(self.num_partitions)
        return {"format": FORMAT, "partitions": [named.get(number) for number in numbers], "rest": named.get("rest")}

    def committed(self, partition: PartitionName) -> Path:
        """A partition's committed file."""
        with self._lock:
            assert partition in self._committed, "the partition was never sealed"
            return self.folder / self._committed[partition].file

    def newest(self, partition: PartitionName) -> Path:
        """The file with a partition's newest bytes: the working file if there is one, else the frozen or the committed one."""
        with self._lock:
            newest = self._working.get(partition) or self._frozen.get(partition)
            return newest.path if newest is not None else self.committed(partition)

    def reader(self, partition: PartitionName) -> TensorFile:
        """A handle on a partition's newest bytes."""
        with self._lock:
            return TensorFile.open(self.newest(partition), counter=self._counter, remedy=REMEDY, direct=self._direct)

    def tensors(self, empty: HostAllocator | None = None) -> TensorReader:
        """Handles on the newest bytes of whichever files are asked for.

        Args:
            empty: makes the tensors that are filled; None for fresh memory.
        """
        return TensorReader(self, empty)

    def has_working(self, partition: PartitionName) -> bool:
        """Whether `writer` would give a file that was written before, and not a new one that must be filled."""
        with self._lock:
            return partition in self._working

    def writer(self, partition: PartitionName) -> TensorFile:
        """A handle on a partition's working file, which is made if there is none: as zeros, every tensor must be written then.

        Raises:
            DiskError: the disk is full, or the file system refused.
        """
        with self._lock:
            if partition not in self._working:
                generation = self._generations.get(partition, -1) + 1
                self._generations[partition] = generation
                name = f"rest.g{generation}" if partition == "rest" else f"p{partition:03d}.g{generation:06d}"
                path = self.folder / f"{name}.safetensors"
                file = TensorFile.create(path, self._layouts[partition], {"file": path.name}, counter=self._counter)
                self._working[partition] = file
            working = self._working[partition].path
            return TensorFile.open(working, writable=True, counter=self._counter, remedy=REMEDY, direct=self._direct)

    def freeze(self, partitions: Iterable[PartitionName]) -> None:
        """Take working files out of use, for `seal` to bring to the drive meanwhile: the next `writer` begins new ones.

        Args:
            partitions: those without a working file stay as they are. Nobody may be writing to them.
        """
        with self._lock:
            for partition in partitions:
                if partition in self._working:
                    assert partition not in self._frozen, "a commit ends before the next begins"
                    self._frozen[partition] = self._working.pop(partition)

    def seal(self, partitions: Iterable[PartitionName]) -> dict[str, Any]:
        """Make working or frozen files the committed ones, once they are on the drive. The files that they replace stay.

        Args:
            partitions: those without such a file stay as they are. Nobody may be writing to them.

        Returns:
            The new state, for the journal.

        Raises:
            DiskError: a file did not reach the drive. These files are gone then, as a second try could seem to succeed.
        """
        partitions = list(partitions)
        with self._lock:
            self.freeze(partition for partition in partitions if partition not in self._frozen)
            changed = {partition: self._frozen[partition] for partition in partitions if partition in self._frozen}
        sealed = {}
        try:
            for partition, file in changed.items():
                file.sync()
                sealed[partition] = Sealed(file.path.name, sha256(file.path, self._counter), file.size)
                if self._direct:
                    file.drop_cache()
            if sealed:
                sync_folder(self.folder)
        except BaseException:
            self._drop(self._frozen, changed)
            raise
        with self._lock:
            self._committed.update(sealed)
            for partition in sealed:
                self._frozen.pop(partition).close()
        return self.state()

    def rollback(self) -> None:
        """Delete the working files: what was written since the last `seal` did not happen."""
        with self._lock:
            self._drop(self._working, list(self._working))

    def discard_obsolete(self, keep: Iterable[Mapping[str, Any]]) -> None:
        """Delete the weight files that neither any of these states nor this store uses.

        Args:
            keep: states, as `seal` returned them, of all commits that are kept.
        """
        with self._lock:
            open_files = (*self._working.values(), *self._frozen.values())
            named = {sealed.file for sealed in self._committed.values()} | {file.path.name for file in open_files}
            for state in keep:
                entries = [*state["partitions"], state["rest"]]
                named |= {entry["file"] for entry in entries if entry is not None}
            for path in self._files():
                if path.name not in named:
                    path.unlink(missing_ok=True)

    def export(self, path: Path, names: Sequence[str], aliases: Mapping[str, str] | None = None) -> None:
        """Write committed weights into one safetensors file with the model's own names, through a buffer of 4 MiB.

        The file appears whole or not at all, replaces one that was there, and has the access rights of the umask.

        Args:
            path: the new file.
            names: the entries of the model's `state_dict`, in its order.
            aliases: for a name of a tensor that has several, the name that it is stored under; it is written under each.

        Raises:
            CheckpointError: a name is not in the store.
            DiskError: the disk is full, or the file system refused.
        """
        path = Path(path)
        keys = {name: weight_key((aliases or {}).get(name, name)) for name in names}
        layout = {name: self._layouts[self.home(key)][key] for name, key in keys.items()}
        beside = path.with_name(path.name + ".new")
        try:
            beside.unlink(missing_ok=True)
            with ExitStack() as stack:
                sources = {
                    partition: stack.enter_context(
                        TensorFile.open(self.committed(partition), counter=self._counter, remedy=REMEDY)
                    )
                    for partition in dict.fromkeys(self.home(key) for key in keys.values())
                }
                # "pt" is what other readers of the format expect of PyTorch's tensors.
                target = TensorFile.create(beside, layout, {"format": "pt"}, counter=self._counter, keep_order=True)
                with target:
                    for name, key in keys.items():
                        target.copy_from(name, sources[self.home(key)], key)
                    target.sync()
                    target.drop_cache()
            beside.replace(path)
            disk.commit_point(f"renamed {path.name}")
        except BaseException as error:
            beside.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise disk_error(path, error, "write it") from error
            raise
        sync_folder(path.parent)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if WEIGHT_FILE.fullmatch(path.name))

    def _drop(self, files: dict[PartitionName, TensorFile], partitions: Iterable[PartitionName]) -> None:
        with self._lock:
            for partition in partitions:
                file = files.pop(partition)
                file.close()
                file.path.unlink(missing_ok=True)


class TensorReader:
    """Reads tensors from the files that are their homes, which it opens as they are needed.

    Args:
        store: whose newest bytes are read.
        empty: makes the tensors that are filled; None for fresh memory.
    """

    def __init__(self, store: WeightStore, empty: HostAllocator | None = None) -> None:
        self._store = store
        self._empty = empty
        self._lock = threading.Lock()
        self._files: dict[PartitionName, TensorFile] = {}

    def read(self, key: str) -> Tensor:
        """A tensor, from a multiple of 64 bytes on.

        Raises:
            CheckpointError: no file holds it.
        """
        return self.open(self._store.home(key)).read(key, self._empty)

    def open(self, partition: PartitionName) -> TensorFile:
        """The handle on a partition's file: of the bytes that were the newest when it was first asked for."""
        with self._lock:
            if partition not in self._files:
                self._files[partition] = self._store.reader(partition)
            return self._files[partition]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nbytes(layout: PartitionLayout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def _close_all(files: dict[PartitionName, TensorFile]) -> None:
    for file in files.values():
        file.close()

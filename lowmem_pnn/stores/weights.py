"""Store of a model's weights, buffers and optimizer state: a file per partition, in generations.

    FOLDER/
      p003.g000012.safetensors   partition 3, generation 12: tensors 'weight/NAME' and 'optimizer/NAME/STATE'
      rest.g0.safetensors        tensors of the model that do not change, or that no partition uses: written once

A file of the last commit is never written to: changes go to a *working* file of the next generation. `freeze` closes the working
file for writing, and `seal` makes it the committed one once it is on the drive; meanwhile the next working file may be begun. The
run's journal alone says which files are committed: `seal` returns what the journal must say, and `open` believes nothing else.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.memory.aligned import HostAllocator
from lowmem_pnn.stores import disk
from lowmem_pnn.stores.disk import RUN_REMEDY, IoCounter, disk_error, outgrows_page_cache, sha256, sync_folder
from lowmem_pnn.stores.header import TensorLayout
from lowmem_pnn.stores.keys import FORMAT, WEIGHT_FILE, CommittedFile, PartitionName, parse_name, parse_state, weight_key
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.stores.tensor_reader import TensorReader

PartitionLayout = Mapping[str, TensorLayout]
"""Element type and shape of every tensor of a partition, by its name in the file (`weight_key`, `state_key`)."""


class WeightStore:
    """Weight files of a run. Make a store with `create`, come back to one with `open`.

    The methods may be called from several threads. Every `reader` and `writer` is an open file of its caller's own, closed by the
    caller.

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
        committed: dict[PartitionName, CommittedFile],
        counter: IoCounter | None,
    ) -> None:
        self.folder = folder
        self._layouts = layouts
        self._committed = committed
        self._counter = counter
        # Two generations, but of what is written once.
        self._direct = outgrows_page_cache(sum(_layout_bytes(layout) * (2 - (one == "rest")) for one, layout in layouts.items()))
        self._partition_of = {key: partition for partition, layout in layouts.items() for key in layout}
        self._lock = threading.RLock()
        # Open from a working file's creation to its seal: only a file that stays open is sure to be told of a failed write-back.
        self._working: dict[PartitionName, TensorFile] = {}
        # Files that were working files until `freeze`, and are not yet on the drive.
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
        """Make an empty store: the caller writes each partition, and the rest, and seals them.

        Args:
            folder: Folder of the store, made if it is not there. Weight files in it are deleted: no journal names them.
            partitions: Layout of each partition's tensors.
            counter: Counts the bytes read and written.
            rest: Layout of the tensors that do not change, or that no partition uses, if there are any: partition 'rest'.

        Raises:
            DiskError: The folder cannot be made or emptied.
        """
        folder = Path(folder)
        layouts: dict[PartitionName, dict[str, TensorLayout]] = {k: dict(layout) for k, layout in enumerate(partitions)}
        if rest:
            layouts["rest"] = dict(rest)
        assert len({key for layout in layouts.values() for key in layout}) == sum(map(len, layouts.values())), (
            "each tensor is in one file"
        )
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
        """Open a store as a commit left it; weight files that no given state names are deleted.

        Args:
            folder: Folder of the store.
            state: State of the commit, as `seal` returned it.
            verify: Whether to compare every file's hash, which reads all of them.
            counter: Counts the bytes read and written.
            keep: States of other commits, whose files are left alone (and unchecked).

        Raises:
            CheckpointError: A file is missing, of another size, in another's place, not in the format, or (with `verify`) was
                changed in any byte. The text names the file. Nothing is deleted then.
            DiskError: The file system refused.
        """
        layouts, committed = _committed_files(Path(folder), state, verify, counter)
        self = cls(Path(folder), layouts, committed, counter)
        self.discard_obsolete([state, *keep])
        return self

    @property
    def num_partitions(self) -> int:
        """Number of partitions, without the rest."""
        return len(self._layouts) - ("rest" in self._layouts)

    def layout(self, partition: PartitionName) -> dict[str, TensorLayout]:
        """Return element type and shape of a partition's tensors, by name in the file; of the rest, nothing where there is none."""
        return dict(self._layouts.get(partition, {}))

    def partition_of(self, key: str) -> PartitionName:
        """Return the partition whose file holds a tensor.

        Raises:
            CheckpointError: No file holds the tensor.
        """
        if key not in self._partition_of:
            raise CheckpointError(f"{str(self.folder)!r} holds no tensor {key!r}; {RUN_REMEDY}")
        return self._partition_of[key]

    def tensor_layout(self, key: str, elements: slice | None = None) -> TensorLayout:
        """Return the type and shape of a tensor, or of some of its elements. Raises as `partition_of` does."""
        dtype, shape = self._layouts[self.partition_of(key)][key]
        return dtype, tuple(shape) if elements is None else (elements.stop - elements.start,)

    def state(self) -> dict[str, Any]:
        """Return what the journal must say to come back to the committed files: JSON-able; None for a partition never sealed."""
        with self._lock:
            entries = {partition: asdict(file) for partition, file in self._committed.items()}
        numbers = range(self.num_partitions)
        return {"format": FORMAT, "partitions": [entries.get(number) for number in numbers], "rest": entries.get("rest")}

    def committed_file(self, partition: PartitionName) -> Path:
        """Return the path of a partition's committed file."""
        with self._lock:
            assert partition in self._committed, "the partition was never sealed"
            return self.folder / self._committed[partition].file

    def newest_file(self, partition: PartitionName) -> Path:
        """Return the path of a partition's newest file: the working file if there is one, else the frozen or the committed one."""
        with self._lock:
            newest = self._working.get(partition) or self._frozen.get(partition)
            return newest.path if newest is not None else self.committed_file(partition)

    def reader(self, partition: PartitionName) -> TensorFile:
        """Open a partition's newest file for reading."""
        with self._lock:
            return TensorFile.open(self.newest_file(partition), counter=self._counter, remedy=RUN_REMEDY, direct=self._direct)

    def tensor_reader(self, allocate: HostAllocator | None = None) -> TensorReader:
        """Return a reader of single tensors, from the newest files of all partitions.

        Args:
            allocate: Allocates the tensors that are filled; None for fresh memory.
        """
        return TensorReader(self.partition_of, self.reader, allocate)

    def has_working_file(self, partition: PartitionName) -> bool:
        """Decide whether `writer` would open a file that was written before, and not a new file that must be filled."""
        with self._lock:
            return partition in self._working

    def writer(self, partition: PartitionName) -> TensorFile:
        """Open a partition's working file for writing; if there is none, a new one, all zeros, whose every tensor must be written.

        Raises:
            DiskError: The disk is full, or the file system refused.
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
            return TensorFile.open(working, writable=True, counter=self._counter, remedy=RUN_REMEDY, direct=self._direct)

    def freeze(self, partitions: Iterable[PartitionName]) -> list[PartitionName]:
        """Close working files for writing, so that `seal` can bring them to the drive while the next `writer` begins new ones.

        Args:
            partitions: Partitions that nobody is writing to; those without a working file stay as they are.

        Returns:
            The partitions that had one. `seal` is for these alone, if it is called while others are written to.
        """
        with self._lock:
            working = [partition for partition in partitions if partition in self._working]
            assert not self._frozen.keys() & set(working), "a commit ends before the next begins"
            self._frozen |= {partition: self._working.pop(partition) for partition in working}
        return working

    def seal(self, partitions: Iterable[PartitionName]) -> dict[str, Any]:
        """Make working or frozen files the committed ones, once they are on the drive. The files that they replace stay.

        Args:
            partitions: Partitions that nobody is writing to; those without a working or frozen file stay as they are.

        Returns:
            The new state, for the journal.

        Raises:
            DiskError: A file did not reach the drive. The files are deleted then, as a second try could seem to succeed.
        """
        partitions = list(partitions)
        with self._lock:
            self.freeze(partition for partition in partitions if partition not in self._frozen)
            changed = {partition: self._frozen[partition] for partition in partitions if partition in self._frozen}
        sealed = {}
        try:
            for partition, file in changed.items():
                file.sync()
                sealed[partition] = CommittedFile(file.path.name, sha256(file.path, self._counter), file.size)
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
        """Delete the working files, and so all that was written since the last `seal`."""
        with self._lock:
            self._drop(self._working, list(self._working))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the files of an earlier `state` (of `seal`), which were kept, as the committed ones, every byte of them checked."""
        _, committed = _committed_files(self.folder, state, True, self._counter)
        with self._lock:
            self._committed = committed

    def discard_obsolete(self, keep: Iterable[Mapping[str, Any]]) -> None:
        """Delete the weight files that neither the kept commits nor this store use.

        Args:
            keep: States, as `seal` returned them, of all commits that are kept.
        """
        with self._lock:
            open_files = (*self._working.values(), *self._frozen.values())
            named = {file.file for file in self._committed.values()} | {file.path.name for file in open_files}
            for state in keep:
                entries = [*state["partitions"], state["rest"]]
                named |= {entry["file"] for entry in entries if entry is not None}
            for path in self._files():
                if path.name not in named:
                    path.unlink(missing_ok=True)

    def export(
        self,
        path: Path,
        names: Sequence[str],
        aliases: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> CommittedFile:
        """Write committed weights into one safetensors file with the model's own names, through a small buffer.

        The file appears whole or not at all, replaces one that was there, and has the access rights of the umask.

        Args:
            path: Path of the new file.
            names: Entries of the model's `state_dict`, in its order.
            aliases: Name in the store, for each other name of a tensor that has several; the tensor is written under each.
            metadata: Texts for the file's header.

        Returns:
            The file's name, hash and size.

        Raises:
            CheckpointError: A name is not in the store.
            DiskError: The disk is full, or the file system refused.
        """
        path = Path(path)
        keys = {name: weight_key((aliases or {}).get(name, name)) for name in names}
        layout = {name: self._layouts[self.partition_of(key)][key] for name, key in keys.items()}
        new_path = path.with_name(path.name + ".new")
        try:
            new_path.unlink(missing_ok=True)
            with ExitStack() as stack:
                sources = {
                    partition: stack.enter_context(
                        TensorFile.open(self.committed_file(partition), counter=self._counter, remedy=RUN_REMEDY)
                    )
                    for partition in dict.fromkeys(self.partition_of(key) for key in keys.values())
                }
                # "pt" is what other readers of the format expect of PyTorch's tensors.
                target = TensorFile.create(
                    new_path, layout, {"format": "pt", **(metadata or {})}, counter=self._counter, keep_order=True
                )
                with target:
                    for name, key in keys.items():
                        target.copy_from(name, sources[self.partition_of(key)], key)
                    target.sync()
                    written = CommittedFile(path.name, sha256(new_path), target.size)  # while it is in the page cache
                    target.drop_cache()
            new_path.replace(path)
            disk.commit_point(f"renamed {path.name}")
        except BaseException as error:
            with suppress(OSError):
                new_path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise disk_error(path, error, "write it") from error
            raise
        sync_folder(path.parent)
        return written

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if WEIGHT_FILE.fullmatch(path.name))

    def _drop(self, files: dict[PartitionName, TensorFile], partitions: Iterable[PartitionName]) -> None:
        with self._lock:
            for partition in partitions:
                file = files.pop(partition)
                # After a failure: the next file is to be given up too, and the failure to be heard of.
                with suppress(OSError):
                    file.close()
                with suppress(OSError):
                    file.path.unlink(missing_ok=True)


def _committed_files(
    folder: Path, state: Mapping[str, Any], verify: bool, counter: IoCounter | None
) -> tuple[dict[PartitionName, dict[str, TensorLayout]], dict[PartitionName, CommittedFile]]:
    """Return what is in the files that a state names, and the files; see `WeightStore.open`."""
    layouts: dict[PartitionName, dict[str, TensorLayout]] = {}
    committed = parse_state(folder, state)
    for partition, expected in committed.items():
        path = folder / expected.file
        with TensorFile.open(path, counter=counter, remedy=RUN_REMEDY) as file:
            layouts[partition] = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
            if file.size != expected.bytes:
                raise CheckpointError(f"{str(path)!r} has {file.size} bytes, the journal says {expected.bytes}; {RUN_REMEDY}")
            if (written_as := file.metadata.get("file")) != expected.file:
                raise CheckpointError(f"{str(path)!r} holds what was written as {written_as!r}; {RUN_REMEDY}")
        if verify and (digest := sha256(path, counter)) != expected.sha256:
            raise CheckpointError(f"{str(path)!r} has sha256 {digest}, the journal says {expected.sha256}; {RUN_REMEDY}")
    return layouts, committed


def _layout_bytes(layout: PartitionLayout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def _close_all(files: dict[PartitionName, TensorFile]) -> None:
    for file in files.values():
        with suppress(OSError):
            file.close()

"""The stores' rates beside the disk's own.

The disk's own rate: direct reads and writes, past the page cache, in blocks as large as a shard, over what is there and into a new
file (whose room the file system and the drive have to find first). A store of boundary activations is written as a run writes it
(shards filled while the one before is on its way; then synced), and read in sequence and shuffled (shards in a random order, their
samples mixed in a window). Beside them what shuffling would cost with a read for each sample. Weight files are read and written
tensor by tensor, into blocks that are used again, as a sweep does it. Stores that would fill the page cache move past it, smaller
ones are kept there for the next reading: both are measured, the first from a cold cache.

All take turns, round after round; before each the drive is left to finish what it has. After each the pages of its files that are
in the page cache are counted, and the process's reads and writes.

    python bench/disk.py [--size 1GB] [--rounds 5] [--quick]

Files go where TMPDIR says.
"""

import argparse
import ctypes
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from common import markdown_table, write_results

from lowmem_pnn.memory.aligned import PAGE_BYTES, aligned_empty
from lowmem_pnn.memory.pool import MemoryPool
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.disk import sync_folder
from lowmem_pnn.stores.encoding import Encoding
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.units import parse_bytes

GOAL = 0.8
SHARD_BYTES = 4 << 20
# Four shards, as in a run.
WINDOW_BYTES = 4 * SHARD_BYTES
# Boundary activations of a 16-channel 32x32 map, in float32.
SPEC = TensorSpec((16, 32, 32), torch.float32)
BATCH = 64
TENSOR_BYTES = 16 << 20
MB = 1e6
# Of single samples that are read at random: enough to tell their rate.
SEEKS = 2000
# Before each measurement: freed room is given back to the drive by then.
SETTLE_SECONDS = 0.5

IN_PLACE, NEW, READ = "disk, direct write in place", "disk, direct write, new file", "disk, direct read"
READ_APART = "disk, direct read, each block elsewhere in memory"


@dataclass
class Seen:
    """What one measurement found.

    Args:
        bytes: that were moved.
        seconds: that it took.
        request_bytes: mean of the process's reads or writes.
        cached_bytes: of the files, in the page cache afterwards.
    """

    bytes: int
    seconds: float
    request_bytes: float
    cached_bytes: int

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds


class Watch:
    """Times what is done inside it, and counts the process's reads and writes."""

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around what is measured."""
        process = psutil.Process()
        before, began = process.io_counters(), time.perf_counter()
        yield
        self.seconds, after = time.perf_counter() - began, process.io_counters()
        calls = after.read_count - before.read_count + after.write_count - before.write_count
        moved = after.read_chars - before.read_chars + after.write_chars - before.write_chars
        self.request_bytes = moved / max(1, calls)

    def seen(self, nbytes: int, paths: Iterable[Path]) -> Seen:
        """What was found, of files of so many bytes."""
        return Seen(nbytes, self.seconds, self.request_bytes, sum(cached_bytes(path) for path in paths))


def cached_bytes(path: Path) -> int:
    """Of a file, in the page cache: asked by mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        found = np.zeros(-(-len(pages) // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(pages, np.uint8)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(pages)), ctypes.c_void_p(found.ctypes.data)
        )
        del view
        assert not failed, os.strerror(ctypes.get_errno())
    return int((found & 1).sum()) * mmap.PAGESIZE


def forget(paths: Iterable[Path]) -> None:
    """Have files leave the page cache: what is read after it comes from the drive."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Files:
    """What is measured, in a folder; all of about one size.

    Args:
        folder: empty.
        size: bytes.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        self._raw, self._fresh = folder / "raw", folder / "fresh"
        self._store, self._weights = folder / "store", folder / "weights.safetensors"
        self.num_blocks = size // SHARD_BYTES
        self.num_samples = size // SPEC.sample_bytes
        self._names = [f"weight{number}" for number in range(size // TENSOR_BYTES)]
        # Memory that direct transfers can use starts at a page; in huge pages they are twice as fast.
        self._memory = memoryview(aligned_empty((WINDOW_BYTES,), torch.uint8, alignment=PAGE_BYTES).numpy())
        self._memory[:] = os.urandom(WINDOW_BYTES)
        self._block = self._memory[:SHARD_BYTES]
        self._batch = torch.randn(BATCH, *SPEC.shape), torch.zeros(BATCH, dtype=torch.int64)
        self._blocks = MemoryPool(2 * TENSOR_BYTES)
        self._tensor = self._blocks.empty((TENSOR_BYTES // 4,), torch.float32)
        self._tensor.normal_()
        self.direct(write=True)

    def settle(self) -> None:
        """Let the drive finish what it has."""
        sync_folder(self._folder)
        time.sleep(SETTLE_SECONDS)

    def direct(self, *, write: bool, new: bool = False, apart: bool = False) -> Seen:
        """Direct transfers, as they are: from and into one block of memory, or into those of a window in turn."""
        blocks = [self._memory[begin : begin + SHARD_BYTES] for begin in range(0, WINDOW_BYTES if apart else 1, SHARD_BYTES)]
        path = self._fresh if new else self._raw
        if new:
            path.unlink(missing_ok=True)
        flags = os.O_DIRECT | (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY)
        descriptor = os.open(path, flags)
        call = os.pwritev if write else os.preadv
        self.settle()
        watch = Watch()
        try:
            with watch.timed():
                for number in range(self.num_blocks):
                    done = call(descriptor, [blocks[number % len(blocks)]], number * SHARD_BYTES)
                    assert done == SHARD_BYTES, "a direct transfer was cut short"
                if write:
                    os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return watch.seen(self.num_blocks * SHARD_BYTES, [path])

    def write_store(self, encoding: Encoding) -> Seen:
        """Float32 values that a store takes, until it is synced."""
        for path in self._store.glob("*"):
            path.unlink()
        self.settle()
        watch = Watch()
        with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(4) as beside, watch.timed():
            writer = ActivationWriter(
                self._store, (SPEC,), self.num_samples, SHARD_BYTES, pool, helpers=beside, encoding=encoding
            )
            tensor, labels = self._batch
            with writer:
                for begin in range(0, self.num_samples, BATCH):
                    count = min(BATCH, self.num_samples - begin)
                    writer.append((tensor[:count],), labels[:count])
        return watch.seen(self.num_samples * SPEC.sample_bytes, self._shards())

    def read_store(self, *, shuffle: bool, direct: bool = True, cold: bool = True) -> Seen:
        """Float32 values that a store gives."""
        if cold:
            forget(self._shards())
        store = ActivationStore.open(self._store, direct=direct)
        self.settle()
        watch = Watch()
        with ThreadPoolExecutor(1) as pool, watch.timed():
            batches = store.batches(BATCH, shuffle=shuffle, seed=0, epoch=0, window_bytes=WINDOW_BYTES, pool=pool)
            seen = sum(len(labels) for _, labels in batches)
            assert seen == self.num_samples, "samples are missing"
        return watch.seen(self.num_samples * SPEC.sample_bytes, self._shards())

    def read_each_sample(self) -> Seen:
        """A full shuffle: a read for each sample."""
        forget([self._raw])
        descriptor = os.open(self._raw, os.O_RDONLY)
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        chosen = np.random.default_rng(0).permutation(self.num_samples - 1)[:SEEKS]
        target = self._block[: SPEC.sample_bytes]
        self.settle()
        watch = Watch()
        try:
            with watch.timed():
                for number in chosen:
                    os.preadv(descriptor, [target], int(number) * SPEC.sample_bytes)
        finally:
            os.close(descriptor)
        return watch.seen(len(chosen) * SPEC.sample_bytes, [self._raw])

    def write_weights(self, *, new: bool, direct: bool = True) -> Seen:
        """What goes into a weight file, until it is synced."""
        layout = {name: (torch.float32, tuple(self._tensor.shape)) for name in self._names}
        if new:
            self._weights.unlink(missing_ok=True)
        self.settle()
        watch = Watch()
        with watch.timed():
            if new:
                file = TensorFile.create(self._weights, layout, direct=direct)
            else:
                file = TensorFile.open(self._weights, writable=True, direct=direct)
            with file:
                for name in self._names:
                    file.write_from(name, self._tensor)
                file.sync()
        return watch.seen(len(self._names) * TENSOR_BYTES, [self._weights])

    def read_weights(self, *, direct: bool = True, cold: bool = True) -> Seen:
        """What comes out of a weight file."""
        if cold:
            forget([self._weights])
        self.settle()
        watch = Watch()
        with watch.timed(), TensorFile.open(self._weights, direct=direct) as file:
            for name in self._names:
                file.read(name, self._blocks.empty)
        return watch.seen(len(self._names) * TENSOR_BYTES, [self._weights])

    def _shards(self) -> list[Path]:
        return sorted(self._store.glob("*.safetensors"))


@dataclass(frozen=True)
class Measure:
    """A row of the table.

    Args:
        beside: the row that it is compared with.
        work: measures it once.
        judged: whether the goal is meant for it.
    """

    beside: str
    work: Callable[[], Seen]
    judged: bool = False


def measures(files: Files) -> dict[str, Measure]:
    """All rows, in the order of their measurement."""
    rows = {
        IN_PLACE: Measure(IN_PLACE, lambda: files.direct(write=True)),
        NEW: Measure(NEW, lambda: files.direct(write=True, new=True)),
        READ: Measure(READ, lambda: files.direct(write=False)),
        READ_APART: Measure(READ, lambda: files.direct(write=False, apart=True)),
        "weight file, write": Measure(NEW, lambda: files.write_weights(new=True), judged=True),
        "weight file, write in place": Measure(IN_PLACE, lambda: files.write_weights(new=False), judged=True),
        "weight file, read": Measure(READ, files.read_weights, judged=True),
        "activations as float32, write": Measure(NEW, lambda: files.write_store("float32"), judged=True),
        "activations as float32, read in sequence": Measure(READ, lambda: files.read_store(shuffle=False), judged=True),
        "activations as float32, read shuffled": Measure(READ, lambda: files.read_store(shuffle=True), judged=True),
        "a read for each sample": Measure(READ, files.read_each_sample),
        "through the cache: activations, first reading": Measure(READ, lambda: files.read_store(shuffle=True, direct=False)),
        "through the cache: activations, next reading": Measure(
            READ, lambda: files.read_store(shuffle=True, direct=False, cold=False)
        ),
        "through the cache: weight file, write": Measure(NEW, lambda: files.write_weights(new=True, direct=False)),
        "through the cache: weight file, write in place": Measure(IN_PLACE, lambda: files.write_weights(new=False, direct=False)),
        "through the cache: weight file, first reading": Measure(READ, lambda: files.read_weights(direct=False)),
        "through the cache: weight file, next reading": Measure(READ, lambda: files.read_weights(direct=False, cold=False)),
    }
    kinds: tuple[Encoding, ...] = ("bfloat16", "int8")
    for encoding in kinds:
        rows |= {
            f"activations as {encoding}, write": Measure(NEW, lambda encoding=encoding: files.write_store(encoding)),
            f"activations as {encoding}, read in sequence": Measure(READ, lambda: files.read_store(shuffle=False)),
            f"activations as {encoding}, read shuffled": Measure(READ, lambda: files.read_store(shuffle=True)),
        }
    return rows


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("1GB"), help="of each file or store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="128 MB, one round: half a minute; writes no page")
    arguments = parser.parse_args()
    size, rounds = (128_000_000, 1) if arguments.quick else (arguments.size, arguments.rounds)
    found: dict[str, list[Seen]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = measures(Files(Path(folder), size))
        for _ in range(rounds):
            for name, measure in rows.items():
                found.setdefault(name, []).append(measure.work())
    table, verdicts = [], []
    for name, measure in rows.items():
        rates = [seen.rate for seen in found[name]]
        # The drive's own rate wanders, from round to round more than within one.
        ratios = [rate / base.rate for rate, base in zip(rates, found[measure.beside], strict=True)]
        ratio = statistics.median(ratios)
        table.append(
            (
                name,
                f"{statistics.median(rates) / MB:.0f}",
                f"{min(rates) / MB:.0f} to {max(rates) / MB:.0f}",
                f"{ratio:.2f}",
                f"{statistics.median(seen.request_bytes for seen in found[name]) / 2**20:.2f}",
                f"{statistics.median(seen.cached_bytes for seen in found[name]) / MB:.0f}",
            )
        )
        if measure.judged:
            verdict = "met" if ratio >= GOAL else "NOT MET"
            verdicts.append(
                f"- {name}: at least {GOAL:g} of '{measure.beside}': {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {verdict}"
            )
    lines = [
        f"Files of {size / MB:.0f} MB, shards and direct blocks of {SHARD_BYTES >> 20} MiB, batches of {BATCH} samples of "
        f"{SPEC.sample_bytes >> 10} KiB, tensors of {TENSOR_BYTES >> 20} MiB.",
        f"Medians of {rounds} round(s); ratios are to the direct rate of the same round: of reading, of writing a new file, or of writing",
        "in place. Rates of activations are those of the float32 values that computing gives or takes, whatever they are kept as.",
        "Writes end when they are on the drive. 'Request' is the mean of the process's reads or writes; 'cached' is what of the files",
        "is in the page cache afterwards. Activations are always written past the page cache.",
        "Where a drive is virtual, a processor copies what it transfers: one block that is used over and over stays in that processor's",
        "cache, and the direct rates gain from it. Reading 'each block elsewhere in memory' is what memory that is used gets at best.",
        "",
        markdown_table(("what", "MB/s", "MB/s, all rounds", "of direct", "request, MiB", "cached, MB"), table),
        "",
        *verdicts,
    ]
    text = "\n".join(lines)
    if arguments.quick:
        print(text)
    else:
        results = {name: [{**vars(seen), "rate": seen.rate} for seen in values] for name, values in found.items()}
        write_results("disk", "The stores beside the disk", text, {"measurements": results})


if __name__ == "__main__":
    main()

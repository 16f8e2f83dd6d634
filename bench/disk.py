"""The stores' rates beside the disk's own.

The disk's own rate: direct reads and writes, past the page cache, in blocks as large as a shard. A store of boundary activations is
written as a run writes it (shards filled while the one before is on its way; then synced and hashed), and read in sequence and
shuffled (shards in a random order, their samples mixed in a window), both from a cold page cache. Beside them what shuffling would
cost with a read for each sample. Weight files are read and written tensor by tensor. All take turns, round after round.

    python bench/disk.py [--size 1GB] [--rounds 3] [--quick]

Files go where TMPDIR says.
"""

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from common import markdown_table, write_results

from lowmem_pnn.chain import TensorSpec
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.encoding import KeptAs
from lowmem_pnn.stores.tensorfile import TensorFile
from lowmem_pnn.units import parse_bytes

GOAL = 0.8
SHARD_BYTES = 4 << 20
WINDOW_BYTES = 32 << 20
# Boundary activations of a 16-channel 32x32 map, in float32.
SPEC = TensorSpec((16, 32, 32), torch.float32)
BATCH = 64
TENSOR_BYTES = 16 << 20
MB = 1e6
# Of single samples that are read at random: enough to tell their rate.
SEEKS = 2000


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


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
        self._raw, self._store, self._weights = folder / "raw", folder / "store", folder / "weights.safetensors"
        self.num_blocks = size // SHARD_BYTES
        self.num_samples = size // SPEC.sample_bytes
        self._names = [f"weight{number}" for number in range(size // TENSOR_BYTES)]
        # Memory that direct transfers can use starts at a page.
        self._block = memoryview(mmap.mmap(-1, SHARD_BYTES))
        self._block[:] = os.urandom(SHARD_BYTES)
        self._batch = torch.randn(BATCH, *SPEC.shape), torch.zeros(BATCH, dtype=torch.int64)
        self._tensor = torch.randn(TENSOR_BYTES // 4)

    def direct(self, *, write: bool) -> float:
        """Bytes a second of direct transfers."""
        flags = os.O_DIRECT | (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY)
        descriptor = os.open(self._raw, flags)
        call = os.pwritev if write else os.preadv

        def transfer() -> None:
            for number in range(self.num_blocks):
                done = call(descriptor, [self._block], number * SHARD_BYTES)
                assert done == SHARD_BYTES, "a direct transfer was cut short"
            if write:
                os.fsync(descriptor)

        try:
            return self.num_blocks * SHARD_BYTES / timed(transfer)
        finally:
            os.close(descriptor)

    def write_store(self, kept_as: KeptAs) -> float:
        """Bytes of float32 a second that a store takes, until it is synced."""
        for path in self._store.glob("*"):
            path.unlink()

        def write() -> None:
            with (
                ThreadPoolExecutor(1) as pool,
                ThreadPoolExecutor(1) as hashing,
                ActivationWriter(
                    self._store, (SPEC,), self.num_samples, SHARD_BYTES, pool, hashing=hashing, kept_as=kept_as
                ) as writer,
            ):
                tensor, labels = self._batch
                for begin in range(0, self.num_samples, BATCH):
                    count = min(BATCH, self.num_samples - begin)
                    writer.append((tensor[:count],), labels[:count])

        return self.num_samples * SPEC.sample_bytes / timed(write)

    def read_store(self, *, shuffle: bool) -> float:
        """Bytes of float32 a second that a store gives, from the drive."""
        forget(self._store.glob("*.safetensors"))
        store = ActivationStore.open(self._store)

        def read() -> None:
            with ThreadPoolExecutor(1) as pool:
                batches = store.batches(BATCH, shuffle=shuffle, seed=0, epoch=0, window_bytes=WINDOW_BYTES, pool=pool)
                seen = sum(len(labels) for _, labels in batches)
                assert seen == self.num_samples, "samples are missing"

        return self.num_samples * SPEC.sample_bytes / timed(read)

    def read_each_sample(self) -> float:
        """Bytes a second of a full shuffle: a read for each sample."""
        forget([self._raw])
        descriptor = os.open(self._raw, os.O_RDONLY)
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        chosen = np.random.default_rng(0).permutation(self.num_samples)[:SEEKS]
        target = self._block[: SPEC.sample_bytes]

        def read() -> None:
            for number in chosen:
                os.preadv(descriptor, [target], int(number) * SPEC.sample_bytes)

        try:
            return len(chosen) * SPEC.sample_bytes / timed(read)
        finally:
            os.close(descriptor)

    def write_weights(self) -> float:
        """Bytes a second that go into a weight file, until it is synced."""
        self._weights.unlink(missing_ok=True)

        def write() -> None:
            layout = {name: (torch.float32, tuple(self._tensor.shape)) for name in self._names}
            with TensorFile.create(self._weights, layout) as file:
                for name in self._names:
                    file.write_from(name, self._tensor)
                file.sync()

        return len(self._names) * TENSOR_BYTES / timed(write)

    def read_weights(self) -> float:
        """Bytes a second that come out of it, from the drive."""
        forget([self._weights])

        def read() -> None:
            with TensorFile.open(self._weights) as file:
                for name in self._names:
                    file.read(name)

        return len(self._names) * TENSOR_BYTES / timed(read)


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("1GB"), help="of each file or store")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="128 MB, one round; writes no page")
    arguments = parser.parse_args()
    size, rounds = (128_000_000, 1) if arguments.quick else (arguments.size, arguments.rounds)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), size)
        measures: dict[str, Callable[[], float]] = {
            "disk, direct write": lambda: files.direct(write=True),
            "disk, direct read": lambda: files.direct(write=False),
            "weight file, write": files.write_weights,
            "weight file, read": files.read_weights,
            "a read for each sample": files.read_each_sample,
        }
        kinds: tuple[KeptAs, ...] = ("float32", "bfloat16", "int8")
        for kept_as in kinds:
            measures |= {
                f"activations as {kept_as}, write": lambda kept_as=kept_as: files.write_store(kept_as),
                f"activations as {kept_as}, read in sequence": lambda: files.read_store(shuffle=False),
                f"activations as {kept_as}, read shuffled": lambda: files.read_store(shuffle=True),
            }
        for _ in range(rounds):
            for name, measure in measures.items():
                found.setdefault(name, []).append(measure())
    rates = {name: statistics.median(values) for name, values in found.items()}
    rows = []
    for name, rate in rates.items():
        base = rates["disk, direct write" if name.endswith("write") else "disk, direct read"]
        spread = f"{min(found[name]) / MB:.0f} to {max(found[name]) / MB:.0f}"
        rows.append((name, f"{rate / MB:.0f}", spread, f"{rate / base:.2f}"))
    judged = [name for name in rates if "float32" in name or name.startswith("weight")]
    lines = [
        f"Files of {size / MB:.0f} MB, shards and direct blocks of {SHARD_BYTES >> 20} MiB, batches of {BATCH} samples of "
        f"{SPEC.sample_bytes >> 10} KiB, tensors of {TENSOR_BYTES >> 20} MiB.",
        f"Medians of {rounds} round(s). Rates of activations are those of the float32 values that computing gives or takes, whatever",
        "they are kept as. Writes end when they are on the drive.",
        "",
        markdown_table(("what", "MB/s", "MB/s, all rounds", "of the disk's direct rate"), rows),
        "",
    ]
    for name in judged:
        ratio = rates[name] / rates["disk, direct write" if name.endswith("write") else "disk, direct read"]
        verdict = "met" if ratio >= GOAL else "NOT MET"
        lines.append(f"- {name}: at least {GOAL:g} of the direct rate: {ratio:.2f}, {verdict}")
    text = "\n".join(lines)
    if arguments.quick:
        print(text)
    else:
        write_results("disk", "The stores beside the disk", text, {"rates": found})


if __name__ == "__main__":
    main()

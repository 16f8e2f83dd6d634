"""The layout of a store of boundary activations on disk: names, shapes, the index; and what its samples take in memory.

FOLDER/
  00000.safetensors   tensors '0', '1', ... (one per boundary tensor, samples on axis 0) and 'labels' (int64, one or a shape each);
                      where a tensor is kept as int8, its scales beside it: '0.scales' (see `encoding.py`)
  00001.safetensors   the same number of samples; the last shard may have fewer
  index.json          written last: without it there is no store
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.memory.aligned import PAGE_BYTES, Empty, aligned_empty
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.disk import IoCounter, crc32, disk_error, sha256, sync_folder
from lowmem_pnn.stores.encoding import KINDS, KeptAs, kept_layout
from lowmem_pnn.stores.header import CODES, DTYPES, TensorLayout, describe, lay_out
from lowmem_pnn.stores.run_directory import write_durably

FORMAT = 2
_READABLE = (1, 2)

_INDEX = "index.json"
_OURS = re.compile(r"\d{5,}\.safetensors|index\.json\.new")
# Per sample of a window, besides the sample: two 8-byte arrays while its order is drawn, and what the sort needs.
_ORDER_BYTES = 24
# A shard is made smaller to fill whole pages only where that is by less than a fifth.
_LEAST_STEPS = 4


@dataclass(frozen=True)
class Shard:
    """What the index says of a shard."""

    file: str
    samples: int
    bytes: int
    crc32: str | None = None
    """Of the file, eight hexadecimal digits."""
    sha256: str | None = None
    """The same in indices of format 1, which have no CRC-32."""

    def checksum(self, path: Path, counter: IoCounter | None) -> tuple[str, str, str | None]:
        """What the index says of the bytes of its file: the kind, what it is of a file, what the index says.

        Args:
            path: the file, which is read.
            counter: counts the bytes read.

        Raises:
            CheckpointError: no such file.
            DiskError: the file system refused.
        """
        if self.crc32 is not None:
            return "CRC-32", crc32(path, counter), self.crc32
        return "sha256", sha256(path, counter), self.sha256


@dataclass(frozen=True)
class Index:
    """What makes a folder of shards a store."""

    num_samples: int
    shard_samples: int
    """In every shard but the last, which may have fewer."""
    tensors: tuple[TensorLayout, ...]
    """Element type and shape of one sample's boundary tensors."""
    shards: tuple[Shard, ...]
    label_shape: tuple[int, ...] = ()
    """Shape of one sample's labels. An index without it, of an earlier version, is of samples with one label each."""
    kept_as: KeptAs = "float32"
    """What the boundary tensors are kept as; an index of an earlier version does not say it."""


def write_index(folder: Path, index: Index) -> None:
    """Make a folder of shards, which are on the drive, a store.

    Raises:
        DiskError: the index could not be written.
    """
    tensors = [{"dtype": CODES[dtype], "shape": list(shape)} for dtype, shape in index.tensors]
    # The names of the shards must be on the drive before the index can be.
    sync_folder(folder)
    shards = [{key: value for key, value in asdict(shard).items() if value is not None} for shard in index.shards]
    content = {"format": FORMAT, **asdict(index), "tensors": tensors, "shards": shards}
    write_durably(folder / _INDEX, json.dumps(content, indent=1))
    sync_folder(folder.parent)


def read_index(folder: Path) -> Index:
    """The index of a store, if it is consistent in itself.

    Raises:
        CheckpointError: it is missing, of another version, or damaged.
        DiskError: the file system refused.
    """
    path = folder / _INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{str(path)!r} is missing: the store was not completed; {remedy(folder)}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{str(path)!r} is no JSON; {remedy(folder)}") from None
    except OSError as error:
        raise disk_error(path, error, "read it") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version not in _READABLE:
        raise CheckpointError(f"{str(path)!r} has format {version}, this version reads {FORMAT}; {remedy(folder)}")
    index = None
    # A part that is missing or of another kind ends in one of these; what can be wrong is too much to tell apart.
    with suppress(KeyError, TypeError, AttributeError):
        tensors = tuple((DTYPES[item["dtype"]], tuple(item["shape"])) for item in content["tensors"])
        shards = tuple(Shard(**item) for item in content["shards"])
        label_shape = tuple(content.get("label_shape", ()))
        kept_as = content.get("kept_as", "float32")
        index = Index(content["num_samples"], content["shard_samples"], tensors, shards, label_shape, kept_as)
    if index is None or not _is_consistent(index):
        raise CheckpointError(f"{str(path)!r} contradicts itself or lacks a part; {remedy(folder)}")
    return index


def make_empty(folder: Path) -> None:
    """Make a folder for a new store, or empty it of an incomplete one.

    Raises:
        CheckpointError: it holds a complete store, or files of something else.
        DiskError: the file system refused.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(folder.iterdir())
        if any(path.name == _INDEX for path in found):
            raise CheckpointError(f"{str(folder)!r} holds a complete store already; delete it, or write to another folder")
        foreign = [path.name for path in found if not _OURS.fullmatch(path.name)]
        if foreign:
            raise CheckpointError(f"{str(folder)!r} holds {foreign[0]!r}, which is no part of a store; write to another folder")
        for path in found:
            path.unlink()
    except OSError as error:
        raise disk_error(folder, error, "make an empty folder") from error


def remedy(folder: Path) -> str:
    """What to do about a damaged store: the end of its error messages."""
    return "restore the run's folder from a copy, or start again with --overwrite"


def shard_name(number: int) -> str:
    """The file of a shard.

    Example:
        >>> shard_name(3)
        '00003.safetensors'
    """
    return f"{number:05d}.safetensors"


def shard_metadata(number: int) -> dict[str, str]:
    """What a shard's header says of it, so that shards cannot change places."""
    return {"shard": str(number)}


def shard_layout(
    specs: Sequence[TensorSpec], num_samples: int, label_shape: tuple[int, ...] = (), kept_as: KeptAs = "float32"
) -> dict[str, TensorLayout]:
    """The tensors of a shard, or of any other stretch of samples: what keeps the boundary tensors, by number, then the labels."""
    layout: dict[str, TensorLayout] = {}
    for number, spec in enumerate(specs):
        for suffix, (dtype, shape) in zip(("", ".scales"), kept_layout(spec, kept_as), strict=False):
            layout[f"{number}{suffix}"] = (dtype, (num_samples, *shape))
    return {**layout, "labels": (torch.int64, (num_samples, *label_shape))}


def allocate(specs: Sequence[TensorSpec], num_samples: int, label_shape: tuple[int, ...], empty: Empty) -> list[Tensor]:
    """Memory for a batch: boundary tensors, then labels, made by `empty` from shape and element type."""
    return [empty(shape, dtype) for dtype, shape in shard_layout(specs, num_samples, label_shape).values()]


def allocate_as_in_file(layout: Mapping[str, TensorLayout], metadata: Mapping[str, str]) -> list[Tensor]:
    """Memory for the tensors of a file: one block in which they lie as they do there, so that they can be moved as they are.

    Args:
        layout: the tensors, in the order of the result.
        metadata: of the file.
    """
    header, entries = lay_out(layout, metadata)
    first, end = len(header), len(header) + sum(entry.nbytes for entry in entries.values())
    block = aligned_empty((end - first,), torch.uint8, alignment=PAGE_BYTES)
    places = {name: slice(entry.offset - first, entry.offset - first + entry.nbytes) for name, entry in entries.items()}
    return [block[places[name]].view(dtype).view(shape) for name, (dtype, shape) in layout.items()]


def samples_per_shard(
    specs: Sequence[TensorSpec],
    num_samples: int,
    shard_bytes: int,
    label_shape: tuple[int, ...] = (),
    kept_as: KeptAs = "float32",
) -> int:
    """Samples of all shards but the last: as many as fit, and at least one.

    A few less where the largest tensor of a shard then fills whole pages: shards that are read one behind the other into a window
    all start at pages then, and can be moved past the page cache.

    Args:
        specs: of one sample's boundary tensors.
        num_samples: of the store.
        shard_bytes: memory for one shard.
        label_shape: of one sample's labels.
        kept_as: what floating tensors are kept as.

    Example:
        >>> samples_per_shard([TensorSpec((64, 7, 7), torch.float32)], 10_000, 1 << 20)
        80
    """
    count = max(1, shard_bytes // resident_bytes(specs, 1, label_shape, kept_as))
    if count < num_samples:
        row_bytes = max(
            math.prod(shape) * dtype.itemsize for dtype, shape in shard_layout(specs, 1, label_shape, kept_as).values()
        )
        step = PAGE_BYTES // math.gcd(PAGE_BYTES, row_bytes)
        if count >= _LEAST_STEPS * step:
            count -= count % step
    return min(num_samples, count)


def by_tensor(tensors: Sequence[Tensor], specs: Sequence[TensorSpec], kept_as: KeptAs) -> list[list[Tensor]]:
    """What `allocate` gave, for each boundary tensor what keeps it, and last the labels."""
    rest = iter(tensors)
    return [[next(rest) for _ in kept_layout(spec, kept_as)] for spec in specs] + [list(rest)]


def resident_bytes(
    specs: Sequence[TensorSpec], num_samples: int, label_shape: tuple[int, ...] = (), kept_as: KeptAs = "float32"
) -> int:
    """What samples take in memory, their labels and the order in which they are given included."""
    layouts = shard_layout(specs, num_samples, label_shape, kept_as).values()
    return num_samples * _ORDER_BYTES + sum(math.prod(shape) * dtype.itemsize for dtype, shape in layouts)


def describe_all(layouts: Iterable[TensorLayout]) -> str:
    """Element types and shapes as error messages say them."""
    return ", ".join(describe(dtype, shape) for dtype, shape in layouts) or "nothing"


def _is_consistent(index: Index) -> bool:
    shapes = [*(shape for _, shape in index.tensors), index.label_shape]
    naturals: list[Any] = [size for shape in shapes for size in shape] + [shard.bytes for shard in index.shards]
    counts: list[Any] = [index.num_samples, index.shard_samples, *(shard.samples for shard in index.shards)]
    if not all(type(number) is int and number >= 0 for number in naturals):
        return False
    if not all(type(number) is int and number > 0 for number in counts):
        return False
    full, rest = divmod(index.num_samples, index.shard_samples)
    return (
        index.kept_as in KINDS
        and [shard.samples for shard in index.shards] == [index.shard_samples] * full + [rest] * (rest > 0)
        and [shard.file for shard in index.shards] == [shard_name(number) for number in range(len(index.shards))]
        and all(isinstance(shard.crc32, str) or (shard.crc32 is None and isinstance(shard.sha256, str)) for shard in index.shards)
    )

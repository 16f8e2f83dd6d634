"""Index of a store of boundary activations: the file that lists the shards with their checksums, and completes the store.

FOLDER/
00000.safetensors   a shard, laid out as `shard_layout.py` says
00001.safetensors   the same number of samples; the last shard may have fewer
index.json          written last: without it there is no store
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.disk import RUN_REMEDY, IoCounter, crc32, disk_error, read_file, sha256, sync_folder, write_durably
from lowmem_pnn.stores.encoding import ENCODINGS, Encoding
from lowmem_pnn.stores.header import DTYPE_BY_NAME, NAME_BY_DTYPE, TensorLayout
from lowmem_pnn.stores.shard_layout import shard_name

FORMAT = 3
_READABLE = (1, 2, 3)

_INDEX = "index.json"
_STORE_FILE = re.compile(r"\d{5,}\.safetensors|index\.json\.new")


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the index lists it."""

    file: str
    samples: int
    bytes: int
    crc32: str | None = None
    """CRC-32 of the file, eight hexadecimal digits."""
    sha256: str | None = None
    """SHA-256 of the file, in indices of format 1, which have no CRC-32."""

    def checksums(self, path: Path, counter: IoCounter | None) -> tuple[str, str, str | None]:
        """Compute the checksum of the shard's file, of the kind that the index has.

        Args:
            path: Path of the file, which is read.
            counter: Counts the bytes read.

        Returns:
            The kind of checksum, the one of the file, and the one in the index.

        Raises:
            CheckpointError: There is no such file.
            DiskError: The file system refused.
        """
        if self.crc32 is not None:
            return "CRC-32", crc32(path, counter), self.crc32
        return "sha256", sha256(path, counter), self.sha256


@dataclass(frozen=True)
class Index:
    """Content of `index.json`: what makes a folder of shards a store."""

    num_samples: int
    shard_samples: int
    """Samples in every shard but the last, which may have fewer."""
    tensors: tuple[TensorLayout, ...]
    """Element type and shape of one sample's boundary tensors."""
    shards: tuple[ShardEntry, ...]
    label_shape: tuple[int, ...] = ()
    """Shape of one sample's labels. An index without it, of an earlier version, is of samples with one label each."""
    kept_as: Encoding = "float32"
    """How floating boundary tensors are stored; an index of an earlier version does not say it."""
    label_dtype: str = NAME_BY_DTYPE[torch.int64]
    """Element type of the labels, by the name that safetensors has for it; an index of an earlier version does not say it."""

    @property
    def labels(self) -> TensorSpec:
        """Shape and element type of one sample's labels."""
        return TensorSpec(self.label_shape, DTYPE_BY_NAME[self.label_dtype])


def write_index(folder: Path, index: Index) -> None:
    """Write the index of shards that are on the drive: from then on the folder is a store.

    Raises:
        DiskError: The index could not be written.
    """
    tensors = [{"dtype": NAME_BY_DTYPE[dtype], "shape": list(shape)} for dtype, shape in index.tensors]
    # The names of the shards must be on the drive before the index can be.
    sync_folder(folder)
    shards = [{key: value for key, value in asdict(shard).items() if value is not None} for shard in index.shards]
    content = {"format": FORMAT, **asdict(index), "tensors": tensors, "shards": shards}
    # On one line, as the journal is.
    write_durably(folder / _INDEX, json.dumps({**content, "sha256": _digest(content)}) + "\n")
    sync_folder(folder.parent)


def read_index(folder: Path) -> Index:
    """Read the index of a store, and check that it is consistent in itself.

    Raises:
        CheckpointError: The index is missing, of another version, or damaged.
        DiskError: The file system refused.
    """
    path = folder / _INDEX
    try:
        content = json.loads(read_file(path, RUN_REMEDY))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{str(path)!r} is missing: the store was not completed; {RUN_REMEDY}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{str(path)!r} is no JSON; {RUN_REMEDY}") from None
    except OSError as error:
        raise disk_error(path, error, "read it") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version not in _READABLE:
        raise CheckpointError(f"{str(path)!r} has format {version}, this version reads {FORMAT}; {RUN_REMEDY}")
    # Indices of earlier versions have no checksum of their own.
    seal = content.pop("sha256", None)
    if (seal is not None or version == FORMAT) and seal != _digest(content):
        raise CheckpointError(f"{str(path)!r} is damaged: its content does not match its checksum; {RUN_REMEDY}")
    index = None
    # A part that is missing or of another kind ends in one of these; what can be wrong is too much to tell apart.
    with suppress(KeyError, TypeError, AttributeError):
        tensors = tuple((DTYPE_BY_NAME[item["dtype"]], tuple(item["shape"])) for item in content["tensors"])
        shards = tuple(ShardEntry(**item) for item in content["shards"])
        label_shape = tuple(content.get("label_shape", ()))
        kept_as = content.get("kept_as", "float32")
        label_dtype = content.get("label_dtype", NAME_BY_DTYPE[torch.int64])
        hash((kept_as, label_dtype))
        index = Index(content["num_samples"], content["shard_samples"], tensors, shards, label_shape, kept_as, label_dtype)
    if index is None or not _is_consistent(index):
        raise CheckpointError(f"{str(path)!r} contradicts itself or lacks a part; {RUN_REMEDY}")
    return index


def make_empty_folder(folder: Path) -> None:
    """Make a folder for a new store, or empty the folder of an incomplete store.

    Raises:
        CheckpointError: The folder holds a complete store, or files of something else.
        DiskError: The file system refused.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(folder.iterdir())
        if any(path.name == _INDEX for path in paths):
            raise CheckpointError(f"{str(folder)!r} holds a complete store already; delete it, or write to another folder")
        foreign = [path.name for path in paths if not _STORE_FILE.fullmatch(path.name)]
        if foreign:
            raise CheckpointError(f"{str(folder)!r} holds {foreign[0]!r}, which is no part of a store; write to another folder")
        for path in paths:
            path.unlink()
    except OSError as error:
        raise disk_error(folder, error, "make an empty folder") from error


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        index.kept_as in ENCODINGS
        and index.label_dtype in DTYPE_BY_NAME
        and len(index.shards) == full + (rest > 0)  # or the lists below could be of any length
        and [shard.samples for shard in index.shards] == [index.shard_samples] * full + [rest] * (rest > 0)
        and [shard.file for shard in index.shards] == [shard_name(number) for number in range(len(index.shards))]
        and all(isinstance(shard.crc32, str) or (shard.crc32 is None and isinstance(shard.sha256, str)) for shard in index.shards)
    )

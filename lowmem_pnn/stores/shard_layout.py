"""Layout of shards of boundary activations: file names, names and shapes of their tensors, and the memory that samples take.

A shard is a safetensors file with the tensors '0', '1', ... (one per boundary tensor, samples on axis 0) and 'labels' (one
label or an array of labels a sample). Where a tensor is stored as int8, its scales lie beside it, as '0.scales' (see `encoding.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lowmem_pnn.memory.aligned import PAGE_BYTES, HostAllocator, aligned_empty
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.encoding import Encoding, encoded_layout
from lowmem_pnn.stores.header import TensorLayout, describe, lay_out

CLASS_LABEL = TensorSpec((), torch.int64)
"""A class number for each sample."""

# Per sample of a window, besides the sample: two 8-byte arrays while the order is drawn, and the workspace of the sort.
_ORDER_BYTES = 24
# A shard is made smaller to fill whole pages only where that takes away less than a fifth of it.
_LEAST_STEPS = 4


def shard_name(number: int) -> str:
    """Return the file name of a shard.

    Example:
        >>> shard_name(3)
        '00003.safetensors'
    """
    return f"{number:05d}.safetensors"


def shard_metadata(number: int) -> dict[str, str]:
    """Return the metadata in a shard's header: the shard's number, so that shards cannot change places."""
    return {"shard": str(number)}


def shard_layout(
    specs: Sequence[TensorSpec], num_samples: int, labels: TensorSpec = CLASS_LABEL, encoding: Encoding = "float32"
) -> dict[str, TensorLayout]:
    """Return element type and shape of the tensors that hold some samples: encoded boundary tensors, by number, then the labels."""
    layout: dict[str, TensorLayout] = {}
    for number, spec in enumerate(specs):
        for suffix, (dtype, shape) in zip(("", ".scales"), encoded_layout(spec, encoding), strict=False):
            layout[f"{number}{suffix}"] = (dtype, (num_samples, *shape))
    return {**layout, "labels": (labels.dtype, (num_samples, *labels.shape))}


def allocate_batch(specs: Sequence[TensorSpec], num_samples: int, labels: TensorSpec, allocate: HostAllocator) -> list[Tensor]:
    """Allocate a batch: boundary tensors, then labels, made by `allocate` from shape and element type."""
    return [allocate(shape, dtype) for dtype, shape in shard_layout(specs, num_samples, labels).values()]


def allocate_as_in_file(layout: Mapping[str, TensorLayout], metadata: Mapping[str, str]) -> list[Tensor]:
    """Allocate the tensors of a file in one block, in which they lie as in the file, so that they can be moved as they are.

    Args:
        layout: Element type and shape of the tensors, in the order of the result.
        metadata: Metadata of the file.
    """
    header, entries = lay_out(layout, metadata)
    first, end = len(header), len(header) + sum(entry.nbytes for entry in entries.values())
    block = aligned_empty((end - first,), torch.uint8, alignment=PAGE_BYTES)
    slices = {name: slice(entry.offset - first, entry.offset - first + entry.nbytes) for name, entry in entries.items()}
    return [block[slices[name]].view(dtype).view(shape) for name, (dtype, shape) in layout.items()]


def samples_per_shard(
    specs: Sequence[TensorSpec],
    num_samples: int,
    shard_bytes: int,
    labels: TensorSpec = CLASS_LABEL,
    encoding: Encoding = "float32",
) -> int:
    """Return the number of samples in all shards but the last: as many as fit, and at least one.

    The number is a little smaller where the largest tensor of a shard then fills whole pages: shards that are read one behind the
    other into a window all start at pages then, and can be read past the page cache.

    Args:
        specs: Shapes and element types of one sample's boundary tensors.
        num_samples: Samples of the store.
        shard_bytes: Memory for one shard.
        labels: Shape and element type of one sample's labels.
        encoding: How floating tensors are stored.

    Example:
        >>> samples_per_shard([TensorSpec((64, 7, 7), torch.float32)], 10_000, 1 << 20)
        80
    """
    count = max(1, shard_bytes // resident_bytes(specs, 1, labels, encoding))
    if count < num_samples:
        row_bytes = max(math.prod(shape) * dtype.itemsize for dtype, shape in shard_layout(specs, 1, labels, encoding).values())
        step = PAGE_BYTES // math.gcd(PAGE_BYTES, row_bytes)
        if count >= _LEAST_STEPS * step:
            count -= count % step
    return min(num_samples, count)


def group_by_boundary_tensor(tensors: Sequence[Tensor], specs: Sequence[TensorSpec], encoding: Encoding) -> list[list[Tensor]]:
    """Group the tensors of a shard: for each boundary tensor its values and scales, and last the labels."""
    rest = iter(tensors)
    return [[next(rest) for _ in encoded_layout(spec, encoding)] for spec in specs] + [list(rest)]


def resident_bytes(
    specs: Sequence[TensorSpec], num_samples: int, labels: TensorSpec = CLASS_LABEL, encoding: Encoding = "float32"
) -> int:
    """Return the bytes that samples take in memory, with their labels and the order in which batches are drawn from them."""
    layouts = shard_layout(specs, num_samples, labels, encoding).values()
    return num_samples * _ORDER_BYTES + sum(math.prod(shape) * dtype.itemsize for dtype, shape in layouts)


def describe_all(layouts: Iterable[TensorLayout]) -> str:
    """Return element types and shapes as error messages say them."""
    return ", ".join(describe(dtype, shape) for dtype, shape in layouts) or "nothing"

"""Activation stores for tests: samples of random bits, floats or numbers, written to a folder and read back."""

import math

import torch

from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.encoding import decode, encode, encoded_layout
from lowmem_pnn.stores.shard_layout import resident_bytes

SPECS = (TensorSpec((3,), torch.float32), TensorSpec((2, 2), torch.bfloat16))
SAMPLE_BYTES = 12 + 8 + 8 + 24  # two tensors, the label, the sample's part of a window's order
PLENTY = 1 << 40


def samples(specs, count, seed=0):
    """Random bits; the labels number the samples."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in specs:
        raw = torch.randint(256, (count * spec.sample_bytes,), generator=generator, dtype=torch.uint8)
        raw = raw % 2 if spec.dtype == torch.bool else raw
        tensors.append(raw.view(spec.dtype).view(count, *spec.shape))
    return tuple(tensors), torch.arange(count)


def write(folder, count, pool, *, specs=SPECS, shard_samples=4, counter=None, step=3):
    tensors, labels = samples(specs, count)
    sample_bytes = sum(spec.sample_bytes for spec in specs) + 8 + 24
    with ActivationWriter(folder, specs, count, shard_samples * sample_bytes, pool, counter) as writer:
        for begin in range(0, count, step):
            writer.append(tuple(tensor[begin : begin + step] for tensor in tensors), labels[begin : begin + step])
    return tensors, labels


def read(store, batch_size, pool, **options):
    options = {"shuffle": False, "seed": 0, "epoch": 0, "window_bytes": PLENTY, **options}
    return list(store.batches(batch_size, pool=pool, **options))


def label_lists(batches):
    return [labels.tolist() for _, labels in batches]


def write_kept(folder, specs, count, encoding, pool, *, shard_samples=4, step=3, seed=0):
    """Floats that are finite, beside random bits; the labels number the samples."""
    tensors, labels = samples(specs, count, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = tuple(
        torch.randn(tensor.shape, generator=generator).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for tensor in tensors
    )
    sample_bytes = resident_bytes(specs, 1, encoding=encoding)
    with ActivationWriter(folder, specs, count, shard_samples * sample_bytes, pool, encoding=encoding) as writer:
        for begin in range(0, count, step):
            writer.append(tuple(tensor[begin : begin + step] for tensor in tensors), labels[begin : begin + step])
    return tensors, sample_bytes


def through(tensor, encoding):
    kept = [
        torch.empty(len(tensor), *shape, dtype=dtype)
        for dtype, shape in encoded_layout(TensorSpec(tuple(tensor.shape[1:]), tensor.dtype), encoding)
    ]
    encode(tensor, kept)
    result = torch.empty_like(tensor)
    decode(kept, result)
    return result


def write_labelled(folder, count, label_shape, pool, *, shard_samples=4, step=3):
    """Samples that hold their number, with labels that follow from it."""
    numbers = torch.arange(count)
    size = math.prod(label_shape)
    labels = (numbers[:, None] * size + torch.arange(size)).reshape(count, *label_shape)
    specs = (TensorSpec((), torch.float32),)
    sample_bytes = resident_bytes(specs, 1, TensorSpec(label_shape, torch.int64))
    with ActivationWriter(
        folder, specs, count, shard_samples * sample_bytes, pool, labels=TensorSpec(label_shape, torch.int64)
    ) as writer:
        for begin in range(0, count, step):
            writer.append((numbers[begin : begin + step].float(),), labels[begin : begin + step])
    return labels, sample_bytes

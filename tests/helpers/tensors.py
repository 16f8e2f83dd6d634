"""Tensors of random bits, and Hypothesis strategies for the layouts of files that hold them."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowmem_pnn.memory.aligned import byte_view
from lowmem_pnn.stores.header import NAME_BY_DTYPE

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
LAYOUTS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(NAME_BY_DTYPE, key=str)), SHAPES), max_size=6)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bits (not values: NaNs with payloads, denormals), so that nothing but a bit-for-bit copy can pass."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator, dtype=torch.uint8).to(torch.bool)
    count = math.prod(shape) * dtype.itemsize
    return torch.randint(256, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), byte_view(tensor.contiguous()).tobytes()

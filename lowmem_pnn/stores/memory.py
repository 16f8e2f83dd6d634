"""Host memory of tensors: allocated at multiples of an alignment, and seen as bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.stores.header import ALIGNMENT


def aligned_empty(shape: Iterable[int], dtype: torch.dtype, pin: bool = False, alignment: int = ALIGNMENT) -> Tensor:
    """An uninitialised tensor on the CPU that starts at a multiple of 64 bytes.

    The last bits of a matrix product depend on where its operands start, so what is handed to compute always starts like this.

    Args:
        shape: in elements.
        dtype: of the elements.
        pin: page-locked memory, for copies to a GPU that run by themselves.
        alignment: in bytes, a multiple of 64: of a page for what is moved past the page cache.

    Example:
        >>> aligned_empty((2, 3), torch.bfloat16).data_ptr() % 64
        0
    """
    shape = tuple(shape)
    if alignment == ALIGNMENT:  # which PyTorch's allocator mostly keeps to
        tensor = torch.empty(shape, dtype=dtype, pin_memory=pin)
        if tensor.data_ptr() % alignment == 0:
            return tensor
        del tensor  # before its memory is asked for again
    nbytes = math.prod(shape) * dtype.itemsize
    block = torch.empty(nbytes + alignment, dtype=torch.uint8, pin_memory=pin)
    skip = -block.data_ptr() % alignment
    return block[skip : skip + nbytes].view(dtype).view(shape)


def memory_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous tensor on the CPU, shared with it; any element type.

    Example:
        >>> memory_of(torch.tensor([1.0, 2.0], dtype=torch.bfloat16)).tolist()
        [128, 63, 0, 64]
    """
    assert tensor.device.type == "cpu", "only tensors on the CPU are read and written"
    assert tensor.is_contiguous(), "only contiguous tensors are read and written"
    assert not tensor.is_conj(), "a lazily conjugated tensor does not hold its own values"
    assert not tensor.is_neg(), "a lazily negated tensor does not hold its own values"
    view: npt.NDArray[np.uint8] = tensor.detach().view(-1).view(torch.uint8).numpy()
    return view

"""Packing: several tensors of a sample kept as one row of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Packing:
    """Several tensors of a sample kept as one row of bytes, so that they go through stores and copies as one tensor.

    Args:
        tree: Structure of the tensors: a tuple, a dictionary, or these in each other.
        shapes: Shape of each, of one sample, in the order of the structure.
        dtypes: Element type of each.
    """

    tree: pytree.TreeSpec
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor of one sample."""
        return [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return rows of bytes (B, bytes), uint8.

        Args:
            tensors: Tensors (B, ...) in the order of the structure, of these shapes and types.
        """
        return torch.cat([tensor.contiguous().reshape(len(tensor), -1).view(torch.uint8) for tensor in tensors], 1)

    def unpack(self, rows: Tensor) -> Any:
        """Return the structure of tensors (B, ...) that `pack` made rows of.

        Args:
            rows: Rows of bytes (B, bytes), on any device.
        """
        parts = rows.split(self.sizes, 1)
        tensors = [
            part.clone(memory_format=torch.contiguous_format).view(dtype).reshape(len(rows), *shape)
            for part, dtype, shape in zip(parts, self.dtypes, self.shapes, strict=True)
        ]
        return pytree.tree_unflatten(tensors, self.tree)

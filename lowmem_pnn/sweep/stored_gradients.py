"""Stored gradients of a sweep: gradients of wide weights over a whole batch, which are never in memory as a whole.

tiles    some rows of a weight at a time, each once, in the scratch store's file
rows     of an embedding those that were looked up, with their numbers; all others are zeros
slice    what a step takes: that part of the tiles, if there are any, and of the rows
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from lowmem_pnn.optim.step_slices import StepSlice
from lowmem_pnn.stores.scratch import Scratch


class StoredGradients:
    """Keeps gradients of wide weights of one batch, and gives slices of them.

    Args:
        scratch: store of the batch's tensors.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tiled: set[str] = set()
        # Numbers of rows, by weight, of each partition that looked some up.
        self._ids: dict[str, list[Tensor]] = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights that have a gradient here."""
        return frozenset(self._shapes)

    def begin_tiles(self, name: str, shape: Sequence[int]) -> None:
        """Make room for the gradient of a weight, which will be written as a whole.

        Args:
            name: name of the weight.
            shape: its shape.
        """
        self._scratch.reserve(("tiles", name), shape, torch.float32)
        self._shapes[name] = tuple(shape)
        self._tiled.add(name)

    def put_tile(self, name: str, first: int, rows: Tensor) -> None:
        """Write the gradient of some rows of a weight; its memory may be used again.

        Args:
            name: name of the weight.
            first: number of the first row.
            rows: gradient of the rows from there on, (rows, features).
        """
        self._scratch.put_elements(("tiles", name), rows, first * rows.shape[1])

    def put_rows(self, name: str, shape: Sequence[int], ids: Tensor, rows: Tensor) -> None:
        """Keep the rows of a gradient that are not zeros; rows of one number add up.

        Args:
            name: name of the weight.
            shape: its shape.
            ids: numbers of the rows, ascending, each once.
            rows: their gradients, (rows, features).
        """
        numbers = self._ids.setdefault(name, [])
        self._scratch.put(("rows", name, len(numbers)), [rows])
        numbers.append(ids)
        self._shapes[name] = tuple(shape)

    def elements(self, name: str, elements: slice | None = None) -> Tensor:
        """Return some elements of a gradient, flat, or all of them, in the weight's shape; the caller may change them.

        Args:
            name: name of the weight.
            elements: elements in the order of memory; None for all.
        """
        shape = self._shapes[name]
        if elements is None:
            return self.elements(name, slice(0, prod(shape))).view(shape)
        begin, end, width = elements.start, elements.stop, shape[-1]
        total = (
            self._scratch.elements(("tiles", name), elements)
            if name in self._tiled
            else torch.zeros(end - begin, dtype=torch.float32)
        )
        first, last = begin // width, -(-end // width)
        for number, ids in enumerate(self._ids.get(name, ())):
            low, high = torch.searchsorted(ids, torch.tensor([first, last])).tolist()
            if low == high:
                continue
            rows = self._scratch.elements(("rows", name, number), slice(low * width, high * width)).view(-1, width)
            places = ids[low:high] - first
            if begin % width == 0 and end % width == 0:
                total.view(-1, width).index_add_(0, places, rows)
            else:
                dense = torch.zeros(last - first, width, dtype=torch.float32).index_add_(0, places, rows)
                total += dense.view(-1)[begin - first * width : end - first * width]
        return total

    def norm(self, name: str, slice_elements: int) -> Tensor:
        """Return the norm of a gradient, made of the norms of its slices.

        Args:
            name: name of the weight.
            slice_elements: elements at a time.
        """
        size = prod(self._shapes[name])
        slices = (slice(begin, min(begin + slice_elements, size)) for begin in range(0, size, slice_elements))
        total: Tensor = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(self.elements(name, one)) for one in slices])
        )
        return total

    def clear(self) -> None:
        """Forget everything; the scratch store is its owner's to clear."""
        self._shapes.clear()
        self._tiled.clear()
        self._ids.clear()


def part_of(whole: nn.Parameter, part: StepSlice, stored: StoredGradients) -> nn.Parameter:
    """Return a parameter, or a slice of it as a flat one that shares its memory, with its gradient, if there is one.

    Args:
        whole: the parameter, with the part of its gradient that is in memory.
        part: slice of it.
        stored: gradients that are made in pieces.
    """
    own = whole
    if not part.is_whole:
        own = nn.Parameter(whole.detach().view(-1)[part.elements])
        own.grad = None if whole.grad is None else whole.grad.reshape(-1)[part.elements]
    if part.name in stored.names:
        gradient = stored.elements(part.name, None if part.is_whole else part.elements)
        own.grad = gradient if own.grad is None else gradient.add_(own.grad)
    return own

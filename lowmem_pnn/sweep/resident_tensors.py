"""Resident tensors of a sweep: weights and optimizer state that stay in memory between visits, where the budget has room for them.

    moved      file --read--> step --write--> file      for every batch
    resident                  step                      into the file before a commit, and before other work needs the memory

What is stepped in place needs no copy: the memory that a file was read into is the memory of the parameter.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

_Place = tuple[str, int | None]
"""Name of a tensor in the weight files, and the first of some of its elements; None for the whole tensor, in its shape."""


class ResidentTensors:
    """Weights, whole, and optimizer state, in the pieces in which it is stepped, that are kept once they were read or written.

    A tensor is given out as it is: a step changes it in place.

    Args:
        weights: names in weight files of the parameters that are kept.
        state: names of the optimizer state that is kept.
    """

    def __init__(self, weights: Iterable[str], state: Iterable[str]) -> None:
        self._weights, self._state = frozenset(weights), frozenset(state)
        self._tensors: dict[_Place, Tensor] = {}
        self._changed: set[_Place] = set()

    @property
    def has_changes(self) -> bool:
        """Whether anything was put that is not in its file."""
        return bool(self._changed)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are in memory."""
        # A list: the reading thread may be adding one.
        return sum(tensor.nbytes for tensor in list(self._tensors.values()))

    def bytes_of(self, keys: Iterable[str]) -> int:
        """Return the bytes of those tensors that are in memory.

        Args:
            keys: names in the weight files.
        """
        named = frozenset(keys)
        return sum(tensor.nbytes for (key, _), tensor in list(self._tensors.items()) if key in named)

    def find(self, key: str, elements: slice | None) -> Tensor | None:
        """Return a tensor, or some of its elements, flat; None where they are not in memory.

        Args:
            key: name in the weight files.
            elements: elements, in the order of the file; None for all of them.
        """
        if elements is None or key in self._state:
            return self._tensors.get((key, None if elements is None else elements.start))
        whole = self._tensors.get((key, None))
        return None if whole is None else whole.view(-1)[elements]

    def keep(self, key: str, elements: slice | None, tensor: Tensor) -> None:
        """Keep a tensor that was read, if it is one of those that stay.

        Args:
            key: name in the weight files.
            elements: elements that it holds; None for all of them.
            tensor: the tensor, on the host.
        """
        if key in self._state or (key in self._weights and elements is None):
            self._tensors[key, None if elements is None else elements.start] = tensor

    def put(self, key: str, first: int | None, tensor: Tensor) -> bool:
        """Take over what would be written to a tensor's file; return whether that is so.

        Args:
            key: name in the weight files.
            first: first of the elements; None for all of them.
            tensor: the new values. Where they are not in the memory that is kept, where a step changes them, they are kept in its place.
        """
        if key in self._weights and first is not None:
            whole = self._tensors.get((key, None))
            if whole is None:
                return False
            there = whole.view(-1)[first : first + tensor.numel()]
            if there.data_ptr() != tensor.data_ptr():
                there.copy_(tensor.view(-1))
            first = None
        elif key in self._weights or key in self._state:
            kept = self._tensors.get((key, first))
            if kept is None or kept.data_ptr() != tensor.data_ptr():
                self._tensors[key, first] = _of_its_own(tensor)
        else:
            return False
        self._changed.add((key, first))
        return True

    def changed(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Yield the tensors that are not in their files: name, first element (None for the whole), and values."""
        for key, first in sorted(self._changed, key=lambda place: (place[0], place[1] or 0)):
            yield key, first, self._tensors[key, first]

    def mark_written(self) -> None:
        """Remember that all of them are in their files."""
        self._changed.clear()

    def clear(self) -> None:
        """Free the memory; what was not written is lost."""
        self._tensors.clear()
        self._changed.clear()


def _of_its_own(tensor: Tensor) -> Tensor:
    """Return a tensor that holds no more memory than it shows."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

"""Scratch store of one batch's tensors, by key: in memory up to a share of the budget, the rest in a temporary file.

A sweep keeps boundary activations, their gradients, random states, and gradients that wait for a step. Together these grow with the
depth of the model; memory must not.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowmem_pnn.memory.aligned import aligned_empty, byte_view
from lowmem_pnn.stores.disk import IoCounter, disk_error
from lowmem_pnn.units import format_bytes


@dataclass(frozen=True)
class _Slot:
    """Location and layout of a tensor in the file."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]
    """Axes of the tensor by falling stride."""
    written: Future[None] | None
    """The write under way; None where it was done at once."""


_Stored = Tensor | _Slot | None

Submit = Callable[[int, Callable[[], None]], "Future[None]"]
"""Function that has a write done on a thread of its own: it is given the bytes that wait until then, and the write."""


class Scratch:
    """Scratch store of tuples of host tensors.

    A tensor comes back with the values and the strides that it had: kernels round differently for another layout. Room in the file
    that is given back is used again for tensors of the same size, so that a loop of equal batches keeps rewriting the same pages.

    Args:
        folder: Folder where the file is made when it is needed; the file has no name there.
        memory_bytes: Most bytes of tensors in memory.
        counter: Counts the bytes written and read.

    Example:
        >>> with Scratch(Path("."), memory_bytes=0, counter=IoCounter()) as scratch:
        ...     scratch.put("x", (torch.arange(3), None))
        ...     scratch.get("x")
        (tensor([0, 1, 2]), None)
    """

    def __init__(self, folder: Path, memory_bytes: int, counter: IoCounter) -> None:
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._counter = counter
        self._stored: dict[Hashable, tuple[_Stored, ...]] = {}
        self._used_bytes = 0
        self._file: int | None = None
        self._end = 0
        self._free: dict[int, list[int]] = {}

    @property
    def file_bytes(self) -> int:
        """Size of the file, with the room that is free in it."""
        return self._end

    def put(self, key: Hashable, tensors: Sequence[Tensor | None], submit: Submit | None = None) -> None:
        """Store tensors; where they stay in memory they are kept as they are, not copied.

        Args:
            key: New key.
            tensors: Tensors on the host; None is stored too.
            submit: Has the writes done later, one after the other; until `wait` returns for the key, its tensors must not change. None
                where they are done at once.

        Raises:
            DiskError: The disk is full, or the file system refused.
        """
        assert key not in self._stored, "each key is put once"
        self._stored[key] = tuple(None if tensor is None else self._store(tensor.detach(), submit) for tensor in tensors)

    def put_later(self, key: Hashable, like: Tensor, get: Callable[[], Tensor], submit: Submit) -> None:
        """Store a tensor in the file that is not on the host yet.

        Args:
            key: New key.
            like: Tensor of its type, shape and strides, which are dense, on any device.
            get: Returns the tensor on the host; called by the write.
            submit: Has the write done later.

        Raises:
            DiskError: The file system refused.
        """
        assert key not in self._stored, "each key is put once"
        order = _order(like)
        self._open()
        offset = self._find_room(like.nbytes)
        written = submit(like.nbytes, lambda: self._move(byte_view(get().permute(order)).data, offset, write=True))
        self._stored[key] = (_Slot(offset, like.nbytes, like.dtype, tuple(like.permute(order).shape), order, written),)

    def reserve(self, key: Hashable, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Make room in the file for a tensor that is written in pieces, all of it before any of it is read.

        Args:
            key: New key.
            shape: Shape of the tensor.
            dtype: Its type.

        Raises:
            DiskError: The file system refused.
        """
        assert key not in self._stored, "each key is put once"
        self._open()
        nbytes = dtype.itemsize * math.prod(shape)
        order = tuple(range(len(shape)))
        self._stored[key] = (_Slot(self._find_room(nbytes), nbytes, dtype, tuple(shape), order, None),)

    def put_elements(self, key: Hashable, tensor: Tensor, first: int) -> None:
        """Write some elements of a tensor that there is room for.

        Args:
            key: Key that `reserve` was given.
            tensor: The elements, contiguous, in the order of memory.
            first: Number of the first one.

        Raises:
            DiskError: The disk is full, or the file system refused.
        """
        (slot,) = self._stored[key]
        assert isinstance(slot, _Slot), "room was made in the file"
        self._move(byte_view(tensor).data, slot.offset + first * slot.dtype.itemsize, write=True)

    def wait(self, key: Hashable) -> None:
        """Wait until the tensors of a key are written.

        Raises:
            DiskError: The disk is full, or the file system refused.
        """
        for stored in self._stored.get(key, ()):
            if isinstance(stored, _Slot) and stored.written is not None:
                stored.written.result()

    def get(self, key: Hashable) -> tuple[Tensor | None, ...]:
        """Return the tensors of a key, not to be written to; tensors from the file are fresh and 64-byte aligned.

        Another thread may call it, while none drops the key.

        Raises:
            KeyError: Nothing was put under the key.
            DiskError: The file system refused.
        """
        return tuple(self._read(stored) if isinstance(stored, _Slot) else stored for stored in self._stored[key])

    def elements(self, key: Hashable, elements: slice) -> Tensor:
        """Return some elements of the only tensor of a key, flat, in the order of its axes.

        Args:
            key: key of one tensor.
            elements: elements to return.

        Raises:
            KeyError: Nothing was put under the key.
            DiskError: The file system refused.
        """
        (stored,) = self._stored[key]
        assert stored is not None, "a tensor was put"
        self.wait(key)
        if not isinstance(stored, _Slot):
            return stored.reshape(-1)[elements]
        if stored.order != tuple(range(len(stored.order))):
            return self._read(stored).reshape(-1)[elements].clone()
        tensor = aligned_empty((elements.stop - elements.start,), stored.dtype)
        self._move(byte_view(tensor).data, stored.offset + elements.start * stored.dtype.itemsize, write=False)
        return tensor

    def pop(self, key: Hashable) -> tuple[Tensor | None, ...]:
        """Return the tensors of a key, and forget the key."""
        tensors = self.get(key)
        self.drop(key)
        return tensors

    def drop(self, key: Hashable) -> None:
        """Forget a key and its tensors, if it is there."""
        for stored in self._stored.pop(key, ()):
            if isinstance(stored, _Slot):
                self._free.setdefault(stored.nbytes, []).append(stored.offset)
            elif stored is not None:
                self._used_bytes -= stored.nbytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._stored

    def clear(self) -> None:
        """Forget everything; the file stays for the next batch."""
        for key in list(self._stored):
            self.drop(key)

    def close(self) -> None:
        """Forget everything, and give the file's room back."""
        self._stored.clear()
        self._free.clear()
        self._end = self._used_bytes = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _store(self, tensor: Tensor, submit: Submit | None) -> Tensor | _Slot:
        order = _order(tensor)
        dense = tensor.permute(order)
        if not dense.is_contiguous():
            order, dense = tuple(range(tensor.dim())), tensor.contiguous()
        if self._used_bytes + tensor.nbytes <= self._memory_bytes:
            if tensor.untyped_storage().nbytes() > tensor.nbytes or dense.data_ptr() != tensor.data_ptr():
                tensor = dense.clone().permute(_inverse(order))  # not the large tensor that it is a piece of
            self._used_bytes += tensor.nbytes
            return tensor
        self._open()
        offset, memory, written = self._find_room(tensor.nbytes), byte_view(dense).data, None
        if submit is None:
            self._move(memory, offset, write=True)
        else:
            written = submit(tensor.nbytes, lambda: self._move(memory, offset, write=True))
        return _Slot(offset, tensor.nbytes, tensor.dtype, tuple(dense.shape), order, written)

    def _read(self, slot: _Slot) -> Tensor:
        if slot.written is not None:
            slot.written.result()
        tensor = aligned_empty(slot.shape, slot.dtype)
        self._move(byte_view(tensor).data, slot.offset, write=False)
        return tensor.permute(_inverse(slot.order))

    def _find_room(self, nbytes: int) -> int:
        if self._free.get(nbytes):
            return self._free[nbytes].pop()
        offset, self._end = self._end, self._end + nbytes
        return offset

    def _open(self) -> None:
        """Make the file, if there is none."""
        if self._file is None:
            try:
                with tempfile.TemporaryFile(dir=self._folder) as file:
                    self._file = os.dup(file.fileno())
            except OSError as error:
                raise disk_error(self._folder / "scratch", error, "make a file") from error

    def _move(self, memory: memoryview, offset: int, *, write: bool) -> None:
        """Write memory to the file, or fill memory from the file."""
        assert self._file is not None, "something was put into it"
        try:
            done = 0
            while done < len(memory):
                call = os.pwritev if write else os.preadv
                count = call(self._file, [memory[done : done + (1 << 30)]], offset + done)
                assert count or write, "what was put is there"
                done += count
        except OSError as error:
            verb = "write" if write else "read"
            raise disk_error(self._folder / "scratch", error, f"{verb} {format_bytes(len(memory))}") from error
        self._counter.add(**{"written" if write else "read": len(memory)})


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Return the axes of a dense tensor in the order of its bytes: by stride, and where strides are equal by number."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis)))


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=lambda axis: order[axis]))

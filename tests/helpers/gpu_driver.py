"""A driver double: a GPU in each of the worlds that drivers and containers make of it, without one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from lowmem_pnn.device.simulated import DelayedCopies
from lowmem_pnn.units import MEBIBYTE

MB = 10**6

PAGE = 20 * MEBIBYTE
"""Bytes by which a segment grows in place."""

World = Literal["nvml", "no bytes", "null bytes", "host ids", "host ids, no bytes", "not listed", "no list", "no nvml", "unified"]

HOST_ID = 4_000_001
"""Our process's id on the host, outside of the container."""


_numbers = count()


class Driver:
    """A device of 8 GB on which others hold 700 MB, and a context of 400 MB, as a driver shows it.

    Args:
        world: what NVML tells: all ("nvml"); the process with 0 bytes, or none; under the host's id; other processes alone; no list of
            processes; nothing at all, as for MIG; nor that, of the host's memory.
        context: bytes of the context.
        exists: whether the context is there before the start.
        stranger: id of another process on the device, which holds the others' memory.
    """

    def __init__(self, world: World = "nvml", *, context: int = 400 * MB, exists: bool = False, stranger: int = 77) -> None:
        self.world, self.stranger, self._number = world, stranger, next(_numbers)
        self.others, self._size = 700 * MB, context
        self.context = context if exists else 0
        self.allocated = self.peak = 0
        self.cached = 0  # of what is allocated, by nobody in use
        self.cap: int | None = None
        self.emptied = self.asked = 0
        self.pinned_emptied = False
        self.is_current = False

    def identity(self) -> str:
        return f"double {self._number}"

    def has_context(self) -> bool:
        return self.context > 0

    def start(self) -> None:
        self.context = self.context or self._size
        self.allocated = 2 * MB  # what the warm-up leaves

    def device_used(self) -> int | None:
        if self.world == "no nvml" and not self.has_context():
            return None
        return self.others + self.context + self.allocated

    def processes(self) -> dict[int, int | None] | None:
        self.asked += 1
        if self.world in ("no nvml", "no list", "unified"):
            return None
        listed: dict[int, int | None] = {self.stranger: self.others}
        if self.has_context() and self.world != "not listed":
            own = HOST_ID if self.world.startswith("host ids") else os.getpid()
            size: int | None = self.context + self.allocated
            if "no bytes" in self.world:
                size = 0
            listed[own] = None if self.world == "null bytes" else size
        return listed

    def total(self) -> int:
        return 8_000 * MB

    def is_unified(self) -> bool:
        return self.world == "unified"

    def spills(self) -> bool:
        return self.world == "unified"

    def reserved(self) -> int:
        return self.allocated

    def peak_reserved(self) -> int:
        return self.peak

    def reset_peak(self) -> None:
        self.peak = self.allocated

    def cap_allocator(self, size: int) -> None:
        self.cap = size

    def empty_cache(self) -> None:
        self.emptied += 1
        self.allocated, self.cached = self.allocated - self.cached, 0

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copies(self) -> DelayedCopies:
        return DelayedCopies()

    @contextmanager
    def current(self) -> Iterator[None]:
        self.is_current = True
        yield
        self.is_current = False

    def empty_pinned_cache(self) -> None:
        self.pinned_emptied = True

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def can_take(self, size: int) -> bool:
        """Decide whether PyTorch would allocate where segments grow in place: it looks at the cap before it rounds up to whole pages."""
        assert self.cap is not None
        return self.allocated + -(-size // (2 * MEBIBYTE)) * 2 * MEBIBYTE <= self.cap

    def take(self, size: int) -> None:
        self.allocate(-(-size // PAGE) * PAGE)

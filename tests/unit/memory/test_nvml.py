"""NVML's view of a device, with a library of our own making."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_pnn.memory.available import available_bytes
from lowmem_pnn.memory.nvml import Nvml

GB = 10**9


class Library:
    """A GPU of 40 GB with a MIG instance of 10 GB on it."""

    class NVMLError(Exception):
        """What this library raises."""

    def __init__(self, known: dict[str, int]) -> None:
        self.known = known
        self.listed: list[SimpleNamespace] | None = []
        self.reserved: int | None = 0

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        if name not in self.known:
            raise self.NVMLError("not found")
        return name

    nvmlMemory_v2 = 2

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int = 1) -> SimpleNamespace:
        if version == self.nvmlMemory_v2 and self.reserved is None:
            raise self.NVMLError("function not found")
        reserved = 0 if version == self.nvmlMemory_v2 else self.reserved or 0
        return SimpleNamespace(total=self.known[handle], used=GB + reserved, free=self.known[handle] - GB - (self.reserved or 0))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        if self.listed is None:
            raise self.NVMLError("not supported")
        return self.listed


def install(monkeypatch: pytest.MonkeyPatch, total: int, known: dict[str, int], *, integrated: bool = False) -> Library:
    library = Library(known)
    monkeypatch.setitem(sys.modules, "pynvml", library)  # type: ignore[arg-type]
    properties = SimpleNamespace(uuid="a-b", total_memory=total, is_integrated=integrated)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return library


@pytest.mark.parametrize(
    ("visible", "known", "free"),
    [
        ("", {"GPU-a-b": 10 * GB}, 9),
        ("", {"GPU-a-b": 40 * GB}, None),  # the whole GPU around an instance
        ("", {"GPU-a-b": 40 * GB, "MIG-a-b": 10 * GB}, 9),
        ("MIG-c-d", {"GPU-a-b": 40 * GB, "MIG-c-d": 10 * GB}, 9),
        ("0", {}, None),
    ],
    ids=["GPU", "MIG by the GPU's name", "MIG by its own", "MIG as it was asked for", "unknown"],
)
def test_a_device_is_found_by_a_name_whose_memory_is_that_of_cuda(
    visible: str, known: dict[str, int], free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, 10 * GB, known)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = Nvml.find(0)
    assert (found and found.free_bytes()) == (free and free * GB)
    assert (found and found.used_bytes()) == (free and GB)


def test_what_the_driver_reserves_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    library = install(monkeypatch, 10 * GB, {"GPU-a-b": 10 * GB})
    found = Nvml.find(0)
    assert found is not None
    for reserved in (GB // 2, None):  # an older driver cannot tell
        library.reserved = reserved
        assert found.used_bytes() == GB
    assert found.free_bytes() == 9 * GB


def test_processes_are_listed_with_what_the_driver_tells_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    library = install(monkeypatch, 10 * GB, {"GPU-a-b": 10 * GB})
    found = Nvml.find(0)
    assert found is not None
    library.listed = [SimpleNamespace(pid=1, usedGpuMemory=None), SimpleNamespace(pid=2, usedGpuMemory=5)]
    assert found.processes() == {1: None, 2: 5}
    library.listed = None
    assert found.processes() is None


def test_what_is_free_is_asked_without_making_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (asked.append(index), (7 * GB, 10 * GB))[1])
    install(monkeypatch, 10 * GB, {"GPU-a-b": 10 * GB})
    assert (available_bytes("cuda"), asked) == (9 * GB, [])
    install(monkeypatch, 10 * GB, {})
    assert (available_bytes("cuda"), asked) == (7 * GB, [0])
    install(monkeypatch, 10 * GB, {}, integrated=True)
    assert available_bytes("cuda") == pytest.approx(available_bytes("cpu"), rel=0.2), "the host's memory, cached files included"

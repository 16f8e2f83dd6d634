"""Kept products: written behind and read ahead, with the values that they had when they were computed."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.device import CpuDevice, Device, SimulatedDevice
from lowmem_pnn.engine.prefetch import WriteBehind
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import DiskError
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.scratch import Scratch
from lowmem_pnn.sweep.kept_products import KeptProducts


class _InPlace(nn.Module):
    """Changes a product as soon as it is there, and returns another one as it is, beside what depends on the first one's values."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.up(x)
        hidden.view(-1).mul_(2.0)
        torch.add(hidden, 1.0, out=hidden)
        return self.down(hidden.relu_()), hidden.sum(1)


@pytest.fixture
def threads() -> Iterator[WorkerThreads]:
    threads = WorkerThreads()
    yield threads
    threads.close()


def _kept(folder: Path, threads: WorkerThreads, window: int, counter: IoCounter, device: Device) -> KeptProducts:
    return KeptProducts(
        device, folder, counter, threads, WriteBehind(threads.write, window), window, [0, 1], lambda product: True
    )


@pytest.mark.parametrize("kind", [CpuDevice, SimulatedDevice])
@pytest.mark.parametrize("window", [0, 3000, 1 << 20], ids=["at-once", "one-waits", "all-wait"])
def test_products_come_back_as_they_were_however_late_they_are_written(
    window: int,
    kind: type[CpuDevice] | type[SimulatedDevice],
    tmp_path: Path,
    threads: WorkerThreads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device that is not the host they are copied beside the computing, here at the last moment."""
    move = Scratch._move

    def late(self: Scratch, memory: memoryview, offset: int, *, write: bool) -> None:
        time.sleep(0.01)
        move(self, memory, offset, write=write)

    monkeypatch.setattr(Scratch, "_move", late)
    layer, counter = _InPlace(), IoCounter()
    device = kind(1 << 30)
    if kind is SimulatedDevice:
        device.open()
    if window == 1 << 20:
        monkeypatch.setattr(SimulatedDevice, "to_host", None)  # for which the host would wait
    kept = _kept(tmp_path, threads, window, counter, device)
    samples = torch.randn(3, 8, 8)
    outputs = []
    with torch.no_grad():
        for number, x in enumerate(samples):
            for index in range(2):
                with kept.keeping(index, number) as finish:
                    returned = finish(layer(x))
                outputs.append([output.clone() for output in returned])
                returned[0].zero_()  # the layer after it may change what it is given
        for number, x in enumerate(samples):
            with kept.reading(range(2), number):
                for index in range(2):
                    with kept.taking(index, number):
                        again = layer(x)
                    assert all(map(torch.equal, again, outputs[2 * number + index]))
    assert counter.bytes_written == counter.bytes_read == 6 * (8 * 64 + 8 * 8) * 4
    kept.close()
    if kind is SimulatedDevice:
        device.close()


def test_a_write_that_fails_is_told_of(tmp_path: Path, threads: WorkerThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Scratch, memory: memoryview, offset: int, *, write: bool) -> None:
        raise DiskError("the disk is full")

    monkeypatch.setattr(Scratch, "_move", full)
    layer, x = _InPlace(), torch.randn(2, 8)
    kept = _kept(tmp_path, threads, 1 << 20, IoCounter(), CpuDevice(1 << 30))

    def go() -> None:
        with kept.keeping(0, 0) as finish:
            finish(layer(x))
        with kept.reading([0], 0), kept.taking(0, 0):
            layer(x)

    with pytest.raises(DiskError, match="the disk is full"), torch.no_grad():
        go()

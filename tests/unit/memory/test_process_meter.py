"""The meter of this process's memory."""

import mmap
import threading
import time
from pathlib import Path

import pytest

from lowmem_pnn.memory import process_meter
from lowmem_pnn.memory.process_meter import MemoryReader, ProcessMemoryMeter, private_bytes
from lowmem_pnn.units import MEBIBYTE


def test_the_meter_sees_a_peak_between_two_questions() -> None:
    meter = ProcessMemoryMeter()
    meter.start()
    meter.begin_section()
    before = private_bytes()
    for _trial in range(3):
        # Mapped by ourselves: malloc may take a block of this size from its heap, and keep it there.
        with mmap.mmap(-1, 40 * MEBIBYTE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            for _ in range(40):
                block.write(bytes(MEBIBYTE))
            time.sleep(0.02)
    assert meter.peak() - before > 36 * MEBIBYTE
    meter.begin_section()
    assert meter.peak() - before < 20 * MEBIBYTE
    meter.stop()
    assert not any(thread.name == "lowmem-meter" and thread is meter._thread for thread in threading.enumerate())


def test_memory_that_is_freed_while_it_is_read_is_not_counted_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    block = mmap.mmap(-1, 40 * MEBIBYTE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(40):
        block.write(bytes(MEBIBYTE))

    class FreedAfterReading:
        def read_bytes(self) -> bytes:
            status = Path("/proc/self/status").read_bytes()
            block.close()
            return status

    before = private_bytes()
    reader = MemoryReader()
    with monkeypatch.context() as patch:
        patch.setattr(process_meter, "_STATUS", FreedAfterReading())
        assert reader.read()[0] > before - 8 * MEBIBYTE
    assert all(reader.read()[0] < before - 32 * MEBIBYTE for _ in range(3))
    reader.close()

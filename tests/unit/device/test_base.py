"""Devices: errors that count as out of memory, the CPU's floor, meter and memory limit, and the simulated device."""

import json
import mmap
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import pytest
import torch

from lowmem_pnn.device import SimulatedDevice, is_out_of_memory
from lowmem_pnn.device.budget import OverBudget
from lowmem_pnn.memory.process_meter import ProcessMemoryMeter, private_bytes
from lowmem_pnn.units import MEBIBYTE

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory limit is RLIMIT_DATA")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OverBudget("12 bytes in use, above the budget of 10"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError(
            'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":1131, please report a bug to PyTorch.'
        ),
    ],
    ids=str,
)
def test_out_of_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("can't allocate memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def _in_a_process(code: str) -> dict[str, Any]:
    """What a fresh process prints as JSON: the floor and the memory limit are a whole process's."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@linux
def test_the_cpu_has_a_floor_a_meter_and_a_memory_limit() -> None:
    found = _in_a_process("""
        import gc, json, resource, time
        import torch
        from lowmem_pnn.device import CpuDevice, is_out_of_memory
        from lowmem_pnn.device.cpu import warm_up
        from lowmem_pnn.memory.process_meter import private_bytes
        from lowmem_pnn.units import MEBIBYTE

        found = {"before": resource.getrlimit(resource.RLIMIT_DATA), "private_before": private_bytes()}
        device = CpuDevice(64 * MEBIBYTE)
        with device:
            warm_up(device.torch_device)
            found["second_step"] = device.section_peak_bytes()
            found["floor"] = device.floor_bytes
            gc.collect()
            device.release()
            device.begin_section()
            start = device.used_bytes()
            x = torch.ones(20 * MEBIBYTE // 4)
            found["used"] = device.used_bytes() - start
            time.sleep(0.05)
            del x
            device.release()
            found["used_after"] = device.used_bytes()
            found["section"] = device.section_peak_bytes() - start
            device.begin_section()
            found["next_section"] = device.section_peak_bytes()
            # Above the budget, and below the memory limit: it is used by now, and seen afterwards.
            x = torch.ones((66 * MEBIBYTE - start) // 4)
            time.sleep(0.05)
            try:
                device.check_budget()
            except MemoryError as error:
                found["check"] = [str(error), is_out_of_memory(error)]
            del x
            device.release()
            found["errors"] = []
            for size in (80 * MEBIBYTE, 1 << 34):
                try:
                    torch.ones(size // 4)
                except RuntimeError as error:
                    found["errors"].append(is_out_of_memory(error))
            small = torch.ones(MEBIBYTE)
        found["after"] = resource.getrlimit(resource.RLIMIT_DATA)
        found["free"] = float(torch.ones(100 * MEBIBYTE // 4).sum())
        found["peak"] = device.peak_bytes
        print(json.dumps(found))
    """)
    mebibyte = MEBIBYTE
    assert found["floor"] > found["private_before"], "the warm-up is in the floor"
    assert found["second_step"] < 4 * mebibyte, "and not in what is used above it"
    assert 19 * mebibyte < found["used"] < 24 * mebibyte
    assert found["used_after"] < 4 * mebibyte
    assert 19 * mebibyte < found["section"] < 24 * mebibyte
    assert found["next_section"] < 4 * mebibyte
    text, recognised = found["check"]
    assert recognised
    assert text.endswith(f"bytes in use, above the budget of {64 * mebibyte}")
    assert found["errors"] == [True, True]
    assert found["after"] == found["before"]
    assert found["free"] == 100 * mebibyte // 4
    assert 64 * mebibyte < found["peak"] < 69 * mebibyte, "the peak stays readable"


@linux
def test_holes_in_the_heap_are_given_back_while_more_is_in_use_than_foreseen() -> None:
    """Blocks that are too small to be mapped, every other one freed: half of the heap is holes."""
    found = _in_a_process("""
        import json, time
        import torch
        from lowmem_pnn.device import CpuDevice
        from lowmem_pnn.units import MEBIBYTE
        def used_with(expected):
            with CpuDevice(256 * MEBIBYTE) as device:
                device.set_expected_peak(expected)
                blocks = [torch.ones(MEBIBYTE // 4) for _ in range(100)]
                del blocks[::2]
                # Asking in vain, while all of it was in use, has made the meter wait for up to half a second.
                ends = time.monotonic() + (2.0 if expected < 100 * MEBIBYTE else 0.1)
                while device.used_bytes() > expected and time.monotonic() < ends:
                    time.sleep(0.01)
                return device.used_bytes(), device.section_peak_bytes()
        print(json.dumps({"much": used_with(200 * MEBIBYTE), "little": used_with(60 * MEBIBYTE)}))
    """)
    used, _ = found["much"]
    assert used > 95 * MEBIBYTE, "what is freed stays, for further use"
    used, _ = found["little"]
    assert used < 60 * MEBIBYTE


@linux
def test_a_peak_does_not_count_what_was_held_before_the_device_was_opened() -> None:
    found = _in_a_process("""
        import json, time
        import torch
        from lowmem_pnn.device import CpuDevice
        from lowmem_pnn.units import MEBIBYTE
        class Cycle:
            pass
        garbage = Cycle()
        garbage.own, garbage.tensor = garbage, torch.ones(50 * MEBIBYTE)
        del garbage  # is collected when the device is opened
        with CpuDevice(64 * MEBIBYTE) as device:
            time.sleep(0.05)
        print(json.dumps({"peak": device.peak_bytes}))
    """)
    assert found["peak"] < 8 * MEBIBYTE


@linux
def test_a_stricter_limit_of_the_user_stays() -> None:
    found = _in_a_process("""
        import json, resource
        import torch
        from lowmem_pnn.device import CpuDevice
        with CpuDevice(1 << 20):
            pass
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 16 << 30))
        with CpuDevice(1 << 40):
            during = resource.getrlimit(resource.RLIMIT_DATA)
        print(json.dumps({"during": during, "after": resource.getrlimit(resource.RLIMIT_DATA)}))
    """)
    assert found["during"] == found["after"] == [8 << 30, 16 << 30]


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


def test_a_simulated_device_fails_above_its_capacity_and_keeps_its_peaks() -> None:
    device = SimulatedDevice(10_000, 4_000)
    with device:
        x = device.to_device(torch.zeros(500))
        with pytest.raises(torch.OutOfMemoryError, match=r"asked for 2\.4 kB where 2\.0 kB of 4\.0 kB are in use"):
            torch.zeros(600)
        assert (device.used_bytes(), device.peak_bytes <= 4_000) == (2_000, True)
        del x
        device.begin_section()
        assert (device.used_bytes(), device.section_peak_bytes()) == (0, 0)
        device.check_budget()
        device.capacity_bytes = 20_000
        y = torch.zeros(3_000)
        with pytest.raises(OverBudget, match="12000 bytes in use, above the budget of 10000"):
            device.check_budget()
        del y
        device.begin_section()
        # What has no bytes takes none.
        ghosts = torch.zeros(10**6, device="meta"), torch.zeros(10**6, device="meta") + 1
        assert device.used_bytes() == 0
        del ghosts
    assert device.peak_bytes == 12_000


def test_reserves_grow_with_the_budget() -> None:
    from lowmem_pnn.device import CpuDevice

    assert CpuDevice.reserve_for(MEBIBYTE) == 4 * MEBIBYTE == CpuDevice.reserve_for(128 * MEBIBYTE)
    assert CpuDevice.reserve_for(1 << 30) == 32 * MEBIBYTE
    assert CpuDevice(1 << 30).reserve_bytes == 32 * MEBIBYTE

"""The CPU as a device, in a process of its own: its floor, meter and memory limit."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lowmem_pnn.units import MEBIBYTE

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory limit is RLIMIT_DATA")


# Imports once, and runs each program that it is sent in a fork of its own, before any thread has begun: its memory is a fresh process's.
_FORKS = """
import json, os, signal, sys, traceback
import torch
import lowmem_pnn.device, lowmem_pnn.device.cpu, lowmem_pnn.device.kernel_memory, lowmem_pnn.memory.heap

for line in sys.stdin:
    child = os.fork()
    if not child:
        signal.alarm(120)
        try:
            exec(json.loads(line), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

InAProcess = Callable[[str], Any]


@pytest.fixture(scope="module")
def in_a_process() -> Iterator[InAProcess]:
    """What a fresh process prints as JSON: the floor and the memory limit are a whole process's."""
    with subprocess.Popen([sys.executable, "-c", _FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forks:
        assert forks.stdin is not None and forks.stdout is not None  # noqa: PT018

        def run(code: str) -> Any:
            print(json.dumps(textwrap.dedent(code)), file=forks.stdin, flush=True)
            printed = []
            while not (line := forks.stdout.readline()).startswith("ended "):
                assert line, "the process is gone"
                printed.append(line)
            assert line == "ended 0\n"
            return json.loads(printed[-1])

        yield run
        forks.stdin.close()


@linux
def test_the_cpu_has_a_floor_a_meter_and_a_memory_limit(in_a_process: InAProcess) -> None:
    found = in_a_process("""
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
            # Above the budget, and before there is a memory limit: it is used by now, and seen afterwards.
            x = torch.ones((66 * MEBIBYTE - start) // 4)
            time.sleep(0.05)
            try:
                device.check_budget()
            except MemoryError as error:
                found["check"] = [str(error), is_out_of_memory(error)]
            del x
            device.release()
            found["errors"] = []
            device.enforce()
            for size in (66 * MEBIBYTE, 1 << 34):
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
def test_holes_in_the_heap_are_given_back_while_more_is_in_use_than_foreseen(in_a_process: InAProcess) -> None:
    """Blocks that are too small to be mapped, every other one freed: half of the heap is holes."""
    found = in_a_process("""
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
def test_a_peak_does_not_count_what_was_held_before_the_device_was_opened(in_a_process: InAProcess) -> None:
    found = in_a_process("""
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
def test_a_stricter_limit_of_the_user_stays(in_a_process: InAProcess) -> None:
    found = in_a_process("""
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


MEASURE = """
import json
import torch
from lowmem_pnn.device.cpu import warm_up
from lowmem_pnn.memory.heap import fix_malloc_thresholds, trim_heap
from lowmem_pnn.memory.process_meter import ProcessMemoryMeter, private_bytes
from lowmem_pnn.device.kernel_memory import scratch_bytes

channels_in, channels_out, size, batch = SHAPE
fix_malloc_thresholds(0)
warm_up(torch.device("cpu"))
meter = ProcessMemoryMeter(interval=0.0002)
meter.start()
layer = torch.nn.Conv2d(channels_in, channels_out, 3, padding=1)
x = torch.rand(batch, channels_in, size, size)
highest = 0
for _ in range(5):
    trim_heap()
    before = private_bytes()
    meter.begin_section()
    with torch.no_grad():
        y = layer(x)
    highest = max(highest, meter.peak() - before)
    bytes_ = y.nbytes + scratch_bytes(torch.ops.aten.convolution.default, (x, layer.weight), y)
    del y
print(json.dumps([highest, bytes_]))
"""


@pytest.mark.parametrize("shape", [(64, 128, 56, 16), (512, 1024, 2, 64)], ids=["large maps", "large weights"])
def test_a_convolution_holds_what_is_foreseen(shape: tuple[int, ...], in_a_process: InAProcess) -> None:
    measured, foreseen = in_a_process(MEASURE.replace("SHAPE", str(shape)))
    assert measured <= foreseen * 1.1 + 2_000_000  # code, and scratch of matrix products
    assert foreseen <= measured * 2


@linux
def test_private_mappings_of_files_are_no_use_while_a_constructor_runs(in_a_process: InAProcess) -> None:
    found = in_a_process("""
        import json, mmap, resource, tempfile, time
        import torch
        from lowmem_pnn.device import CpuDevice
        from lowmem_pnn.errors import BudgetError
        from lowmem_pnn.units import MEBIBYTE

        def take(megabytes):
            try:
                torch.empty(megabytes * MEBIBYTE, dtype=torch.uint8)
                return True
            except (MemoryError, RuntimeError):
                return False

        found = {}
        with tempfile.TemporaryFile() as file, CpuDevice(64 * MEBIBYTE) as device:
            file.truncate(256 * MEBIBYTE)
            device.enforce()
            found["before"] = take(200)
            with device.metered():
                maps = [mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) for _ in range(2)]
            found["after"], found["small"] = take(200), take(20)
            try:
                with device.metered():
                    held = [torch.ones(MEBIBYTE // 4) for number in range(1000) if not time.sleep(0.002)]
                    found["held"] = True
            except BudgetError as error:
                found["fault"] = str(error)
            found["once more"] = take(200)
        print(json.dumps(found))
    """)
    assert found.pop("fault").startswith("building the model takes 6")
    assert found == {"before": False, "after": False, "small": True, "once more": False}

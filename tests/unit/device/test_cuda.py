"""The GPU: its budget's accounting with a driver of our own making, and, where there is one, a real run."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.gpu_driver import MB, PAGE, Driver, World
from lowmem_pnn.device import CudaDevice, context_memory, cuda_driver
from lowmem_pnn.device.cuda_driver import CudaCopies, NvidiaDriver, leave_expandable_segments, use_expandable_segments
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.units import MEBIBYTE


@pytest.mark.parametrize("world", ["nvml", "not listed"])
def test_the_allocator_gets_the_budget_without_the_context(world: World) -> None:
    driver = Driver(world)
    with CudaDevice(2_000 * MB, driver=driver) as device:
        assert device.fixed_bytes == 402 * MB, "the context, and the workspaces that the warm-up leaves in the allocator"
        assert device.context == {"bytes": 400 * MB, "found": "nvml" if world == "nvml" else "difference"}
        assert driver.cap == 1_600 * MB - PAGE
        assert driver.is_current
        driver.allocate(998 * MB)
        driver.allocate(-500 * MB)
        assert device.used_bytes() == 900 * MB
        assert device.section_peak_bytes() == 1_400 * MB
        device.begin_section()
        assert device.section_peak_bytes() == 900 * MB
        driver.allocate(50 * MB)
        assert (device.section_peak_bytes(), device.peak_bytes) == (950 * MB, 1_400 * MB)
        device.check_budget()
        device.release()
        assert driver.emptied == 1
    assert driver.cap == driver.total(), "the allocator is free again"
    assert not driver.is_current
    assert device.peak_bytes == 1_400 * MB


@pytest.mark.parametrize("name", ["copies", "current", "reset_peak"])
def test_an_opening_that_fails_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError(name)

    driver = Driver()
    monkeypatch.setattr(driver, name, fail)
    with pytest.raises(RuntimeError, match=name):
        CudaDevice(2_000 * MB, driver=driver).open()
    assert driver.cap in (None, driver.total())
    assert not driver.is_current


def test_an_allocator_that_takes_whole_pages_stays_within_the_budget() -> None:
    driver = Driver()
    with CudaDevice(1_000 * MB, driver=driver) as device:
        while driver.can_take(22 * MB):
            driver.take(22 * MB)
        device.check_budget()
        assert device.section_peak_bytes() > 940 * MB
        assert CudaDevice.reserve_for(1_000 * MB) == PAGE + 1_000 * MB // 32, "plans stay below the cap"


def test_scope_allocator_leaves_the_context_out() -> None:
    driver = Driver()
    with CudaDevice(300 * MB, scope="allocator", driver=driver) as device:
        assert device.fixed_bytes == 2 * MB
        assert driver.cap == 300 * MB - PAGE
        driver.allocate(98 * MB)
        assert device.peak_bytes == 100 * MB
    with CudaDevice(2 * MB, scope="allocator", driver=driver):
        assert driver.cap == 0, "the plan says what would be enough"


def test_libraries_that_are_loaded_later_are_taken_from_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_memory, "_SECONDS_BETWEEN", 0.0)
    driver = Driver()
    with CudaDevice(1_000 * MB, driver=driver) as device:
        driver.allocate(500 * MB)
        driver.context += 60 * MB
        device.begin_section()
        assert device.fixed_bytes == 462 * MB
        assert driver.cap == 540 * MB - PAGE
        driver.context += 50 * MB
        driver.cached = 20 * MB
        device.begin_section()
        assert device.section_peak_bytes() == 992 * MB, "what the allocator kept for nobody went"
        device.check_budget()
        driver.context += 20 * MB
        device.begin_section()
        with pytest.raises(MemoryError, match="1012000000 bytes in use, above the budget of 1000000000"):
            device.check_budget()


def test_what_others_take_meanwhile_is_not_ours() -> None:
    driver = Driver("not listed")
    with CudaDevice(1_000 * MB, driver=driver) as device:
        driver.others += 3_000 * MB
        device.begin_section()
        assert device.fixed_bytes == 402 * MB
        assert driver.cap == 600 * MB - PAGE


def test_a_budget_below_the_context_is_refused() -> None:
    with pytest.raises(
        BudgetError,
        match=r"the CUDA context alone holds 400\.0 MB on the device, and --max-gpu-mem is 300\.0 MB; "
        r"give more, or --budget-scope allocator to leave the context out",
    ):
        CudaDevice(300 * MB, driver=Driver()).open()


def test_a_budget_above_the_device_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"--max-gpu-mem 9\.00 GB is more than the device has, 8\.00 GB; give less"):
        CudaDevice(9_000 * MB, driver=Driver()).open()


@pytest.mark.parametrize(("scope", "room"), [("process", "2.00 GB"), ("allocator", "1.60 GB")])
def test_what_other_processes_hold_cannot_be_given(scope: Any, room: str) -> None:
    driver = Driver()
    driver.others = 6_000 * MB
    with CudaDevice(1_600 * MB, scope=scope, driver=driver):
        pass
    with pytest.raises(
        BudgetError,
        match=rf"--max-gpu-mem 2\.10 GB is more than the device can give, {room} of 8\.00 GB: other processes hold 6\.00 GB; "
        "give less, or end them",
    ):
        CudaDevice(2_100 * MB, scope=scope, driver=driver).open()


def test_plans_leave_room_for_workspaces_and_segments() -> None:
    assert CudaDevice.slack_for(200 * MB) == 22 * MEBIBYTE
    assert CudaDevice.slack_for(1 << 30) == 64 * MEBIBYTE


def test_segments_expand_where_the_user_has_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    given = [""]
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: given[0], raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, garbage_collection_threshold:0.8")
    assert use_expandable_segments()
    given[0] = "roundup_power2_divisions:[256:1,>:2]"
    assert use_expandable_segments()
    given[0] = asked[-1]
    assert leave_expandable_segments()
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    assert not use_expandable_segments()
    assert asked == [
        "max_split_size_mb:64, garbage_collection_threshold:0.8,expandable_segments:True",
        "roundup_power2_divisions:[256:1,>:2],expandable_segments:True",
        "roundup_power2_divisions:[256:1,>:2],expandable_segments:False",
    ]


def test_a_gpu_that_cannot_map_memory_in_place_trains_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a virtual GPU, or one in WSL: the driver says so at the first allocation."""
    asked: list[str] = []
    faults = ["CUDA driver error: operation not supported"]

    def warm_up(device: torch.device) -> None:
        if faults:
            raise RuntimeError(faults.pop(0))

    monkeypatch.setattr(cuda_driver, "warm_up", warm_up)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: "", raising=False)
    for name, answer in {
        "init": None, "synchronize": None, "empty_cache": None, "get_device_properties": SimpleNamespace(is_integrated=0)
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    driver = NvidiaDriver(1)
    driver.start()
    assert asked == ["expandable_segments:True", "expandable_segments:False"]
    faults += ["CUDA driver error:\nunknown error"] * 2
    with pytest.raises(
        ConfigError, match="--device cuda:1: a first step of training fails there: CUDA driver error: unknown error; give"
    ):
        driver.start()
    faults += ["CUDA out of memory. Tried to allocate 2 MiB"]
    with pytest.raises(RuntimeError, match="out of memory"):
        driver.start()


def test_a_gpu_that_is_not_there_is_refused() -> None:
    found = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=rf"--device cuda:9: found {found} CUDA devices here; give --device cpu"):
        CudaDevice(1_000 * MB, index=9).open()


def test_page_locked_memory_counts_as_the_hosts() -> None:
    driver = Driver()
    with CudaDevice(1_600 * MB, driver=driver) as device:
        assert device.transfers is not None
        before = device.host_peak_bytes
        piece = device.transfers.empty((1000,), torch.float32)
        assert device.host_peak_bytes >= before + device.transfers.slab.size
        assert device.transfers.slab.size == 1 << 26
        assert device.transfers.slab.owns(piece)
        del piece
        peak = device.host_peak_bytes
    assert driver.pinned_emptied
    assert device.host_peak_bytes >= peak - 10 * MB
    assert device.transfers.slab.held_bytes == 0
    with CudaDevice(1_600 * MB, driver=driver, max_host_mem=200 * MB) as device:
        assert device.transfers is not None
        assert device.transfers.slab.size == 1 << 24, "an eighth of the bound, in powers of two"


def test_a_copy_waits_for_what_was_computed_and_what_is_computed_then_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few calls of torch.cuda, in their order: there may be no GPU here."""
    log: list[tuple[object, ...]] = []
    current = ["computing"]

    class Event:
        def __init__(self, of: str) -> None:
            self.of = of

        def synchronize(self) -> None:
            log.append(("host waits for", self.of))

        def query(self) -> bool:
            return False

    class Stream:
        names = iter(["up", "down"])

        def __init__(self, device: object = None, name: str | None = None) -> None:
            self.name = name or next(self.names)

        def wait_stream(self, other: "Stream") -> None:
            log.append((self.name, "waits for", other.name))

        def wait_event(self, event: Event) -> None:
            log.append((self.name, "waits for", event.of))

        def record_event(self) -> Event:
            log.append((self.name, "marks"))
            return Event(self.name)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, current[0] = current[0], stream.name
        yield
        current[0] = before

    class Target(Tensor):
        def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
            log.append((current[0], "copies", non_blocking))
            return super().copy_(source)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name=current[0]))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "device", lambda device: log.append(("on", device.index)) or nullcontext())
    copies = CudaCopies(torch.device("cuda", 1))
    target = torch.zeros(3).as_subclass(Target)
    event = copies.upload(torch.ones(3), target)
    assert target.tolist() == [1, 1, 1]
    assert not event.is_complete()
    event.block_computing()
    event.wait()
    copies.download(torch.ones(3), target)
    assert log == [
        ("up", "waits for", "computing"), ("up", "copies", True), ("up", "marks"), ("on", 1), ("computing", "waits for", "up"),
        ("on", 1), ("host waits for", "up"), ("down", "waits for", "computing"), ("down", "copies", True), ("down", "marks"),
    ]  # fmt: skip

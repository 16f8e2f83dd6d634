"""The context's memory, in every world that drivers and containers make of it."""

import os

import pytest

from helpers.gpu_driver import HOST_ID, MB, PAGE, Driver, World
from lowmem_pnn.device import CudaDevice
from lowmem_pnn.device.context_memory import ASSUMED_BYTES, LEAST_BYTES, ContextMemory
from lowmem_pnn.errors import BudgetError


def found(driver: Driver) -> tuple[int, str]:
    context = ContextMemory(driver)
    context.start()
    return context.size // MB, context.how


@pytest.mark.parametrize(
    ("world", "size", "how"),
    [
        ("nvml", 400, "nvml"),
        ("host ids", 400, "nvml"),  # the entry that is new is ours
        ("no bytes", 400, "difference"),  # a figure below what the allocator holds is none
        ("null bytes", 400, "difference"),
        ("host ids, no bytes", 400, "difference"),
        ("not listed", 400, "difference"),
        ("no list", 400, "difference"),
        ("no nvml", 600, "assumed"),  # cudaMemGetInfo would make the context before the first look
        ("unified", 600, "assumed"),
    ],
)
def test_the_context_is_found_in_every_world(world: World, size: int, how: str) -> None:
    assert found(Driver(world)) == (size, how)


@pytest.mark.parametrize("world", ["no bytes", "host ids, no bytes", "not listed", "no list"])
def test_the_second_run_of_a_process_remembers_what_the_first_has_found(world: World) -> None:
    driver = Driver(world)
    assert found(driver) == (400, "difference")
    assert found(driver) == (400, "difference"), "the device holds no more than before now"
    assert found(Driver(world, exists=True)) == (600, "assumed"), "another device's context is not known"


def test_the_second_run_knows_its_id_on_the_host() -> None:
    driver = Driver("host ids")
    assert found(driver) == (400, "nvml")
    driver.context += 80 * MB
    assert found(driver) == (480, "nvml")


@pytest.mark.parametrize("world", ["nvml", "host ids"])
def test_a_context_that_a_notebook_made_before_is_found_by_our_own_id_alone(world: World) -> None:
    assert found(Driver(world, exists=True)) == ((400, "nvml") if world == "nvml" else (600, "assumed"))


def test_another_process_that_has_our_id_on_the_host_is_not_taken_for_us() -> None:
    driver = Driver("host ids", stranger=os.getpid())
    driver.others = 3_000 * MB
    assert found(driver) == (400, "nvml")
    assert driver.processes() == {os.getpid(): 3_000 * MB, HOST_ID: 402 * MB}


@pytest.mark.parametrize("world", ["nvml", "no list"])
def test_less_than_a_context_holds_is_not_believed(world: World) -> None:
    assert found(Driver(world, context=90 * MB)) == (LEAST_BYTES // MB, "assumed")


@pytest.mark.parametrize(("taken", "size"), [(3_000, ASSUMED_BYTES), (-900, LEAST_BYTES)])
def test_what_others_take_or_leave_at_the_start_is_no_context(taken: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("no list")
    driver.others = 1_000 * MB
    start = driver.start

    def start_beside_others() -> None:
        start()
        driver.others += taken * MB

    monkeypatch.setattr(driver, "start", start_beside_others)
    assert found(driver) == (size // MB, "assumed")


def test_the_driver_is_asked_again_at_most_once_a_second() -> None:
    driver, now = Driver(), [0.0]
    context = ContextMemory(driver, clock=lambda: now[0])
    context.start()
    asked, driver.context = driver.asked, 500 * MB
    for _ in range(75):
        now[0] += 0.02
        context.look_again()
    assert driver.asked == asked + 1
    assert (context.size, context.how) == (500 * MB, "nvml")
    driver.context = 450 * MB
    context.look_again(now=True)
    assert context.size == 500 * MB, "what was loaded stays"


@pytest.mark.parametrize("world", ["nvml", "no bytes", "host ids", "no nvml"])
def test_two_runs_of_a_process_stay_within_the_budget(world: World) -> None:
    driver = Driver(world)
    for _ in range(2):
        with CudaDevice(1_000 * MB, driver=driver) as device:
            assert driver.cap is not None
            assert driver.cap + PAGE + driver.context <= 1_000 * MB
            assert device.context["bytes"] == 1_000 * MB - PAGE - driver.cap


def test_a_budget_below_an_assumed_context_says_that_it_is_assumed() -> None:
    with pytest.raises(
        BudgetError, match=r"the CUDA context alone holds 600\.0 MB \(assumed: the driver does not tell\) on the device"
    ):
        CudaDevice(500 * MB, driver=Driver("no nvml")).open()

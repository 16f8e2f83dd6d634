"""Waiting is counted once, by kind, and only where computing waits."""

import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from lowmem_pnn.engine.stalls import Stalls, describe_stalls, stall_shares


class FakeClock:
    """Time that goes on only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_seconds_add_up_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stalls = FakeClock(monkeypatch), Stalls()
    for kind, seconds in (("disk", 2), ("data", 3), ("disk", 4)):
        clock.now += 10
        with stalls.waiting(kind):  # type: ignore[arg-type]
            clock.now += seconds
    assert stalls.seconds() == {"disk": 6, "copy": 0, "data": 3}


def test_a_wait_inside_of_a_wait_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stalls = FakeClock(monkeypatch), Stalls()
    with stalls.waiting("data"):
        clock.now += 1
        with stalls.waiting("disk"):
            clock.now += 2
    assert stalls.seconds() == {"disk": 0, "copy": 0, "data": 3}


def test_a_wait_that_fails_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stalls = FakeClock(monkeypatch), Stalls()

    def fail() -> None:
        with stalls.waiting("disk"):
            clock.now += 1
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    with stalls.waiting("copy"):
        clock.now += 2
    assert stalls.seconds() == {"disk": 1, "copy": 2, "data": 0}


def test_iterating_counts_the_making_of_items_and_not_their_use(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stalls = FakeClock(monkeypatch), Stalls()

    def make() -> Iterator[int]:
        for number in range(3):
            clock.now += 1
            yield number
        clock.now += 5  # the end has to be waited for too

    seen = []
    for number in stalls.iterate("data", make()):
        seen.append(number)
        clock.now += 100
    assert seen == [0, 1, 2]
    assert stalls.seconds() == {"disk": 0, "copy": 0, "data": 8}


def test_iterating_holds_no_item_while_the_next_is_made() -> None:
    class Item:
        """Something that can be watched."""

    alive: list[int] = []
    watched: list[Any] = []

    def make() -> Iterator[Item]:
        for _ in range(3):
            alive.append(sum(item() is not None for item in watched))
            item = Item()
            watched.append(weakref.ref(item))
            yield item
            del item

    for item in Stalls().iterate("data", make()):
        del item
    assert alive == [0, 0, 0]


def test_shares_and_words() -> None:
    assert stall_shares({"disk": 1.0, "data": 0.0}, {"disk": 2.0, "data": 0.5}, 4.0) == {"disk": 0.25, "data": 0.125}
    assert describe_stalls({"disk": 0.25, "data": 0.004}) == "waiting for: disk 25 %, data 0 %"

"""Pace: steps that become several times slower are said once, and nothing else is."""

from collections.abc import Iterable

from lowmem_pnn.engine.pace import Pace


def said(seconds: Iterable[float]) -> list[str]:
    now, told = [0.0], []
    pace = Pace(told.append, clock=lambda: now[0])
    pace.step()
    for each in seconds:
        now[0] += each
        pace.step()
    return told


def test_steps_that_stay_several_times_slower_are_said_once() -> None:
    assert said([0.5] * 20 + [3.0] * 50) == [
        "steps take 3 s, and took 0.5 at first: the driver may have moved the device's memory to the host, for want of room; end other "
        "programs that use the GPU, or give a smaller --max-gpu-mem"
    ]


def test_a_slow_start_commits_and_validation_are_no_pace() -> None:
    assert said([60.0] + [0.5] * 20) == []
    assert said([0.5, 0.5, 9.0, 0.5] * 30) == []
    assert said([0.5] * 20 + [1.5] * 50) == []

"""Learning-rate schedules: PyTorch's own, as a function of the step alone."""

from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler

from lowmem_pnn.optim.lr_schedules import Schedule, lr_factor, scheduled_rate

LR = 0.3
LENGTHS = [1, 2, 3, 4, 5, 7, 10, 33, 1000]


def rates_of(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], total_steps: int) -> list[float]:
    """The learning rate at each step of a loop as everybody writes it: the scheduler's step after the optimizer's."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    rates = []
    scheduler = make(optimizer)
    for step in range(total_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if step < total_steps - 1:  # one cycle refuses to go past its end
            scheduler.step()
    return rates


def factors(schedule: Schedule, total_steps: int, warmup_steps: int = 0) -> list[float]:
    return [lr_factor(schedule, step, total_steps, warmup_steps) for step in range(total_steps)]


@pytest.mark.parametrize("total_steps", LENGTHS)
def test_cosine_is_same_as_pytorchs(total_steps: int) -> None:
    expected = rates_of(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps), total_steps)
    assert [LR * value for value in factors("cosine", total_steps)] == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("total_steps", LENGTHS)
def test_one_cycle_is_same_as_pytorchs(total_steps: int) -> None:
    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=total_steps, cycle_momentum=False)

    expected = rates_of(make, total_steps)
    assert [LR * value for value in factors("onecycle", total_steps)] == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("total_steps", LENGTHS)
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_linear_is_the_line_of_huggingfaces_trainers(total_steps: int, warmup_steps: int) -> None:
    def factor(step: int) -> float:  # transformers.get_linear_schedule_with_warmup, after the warm-up
        return max(0.0, float(total_steps - step) / float(max(1, total_steps - warmup_steps)))

    found = factors("linear", total_steps, warmup_steps)
    expected = rates_of(lambda optimizer: lr_scheduler.LambdaLR(optimizer, factor), total_steps)
    assert [LR * value for value in found[warmup_steps:]] == expected[warmup_steps:]


@pytest.mark.parametrize("total_steps", LENGTHS)
def test_a_minimum_is_pytorchs_eta_min(total_steps: int) -> None:
    expected = rates_of(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps, eta_min=0.1), total_steps)
    found = [scheduled_rate("cosine", LR, 0.1, step, total_steps) for step in range(total_steps)]
    assert found == pytest.approx(expected, rel=1e-6, abs=0)
    assert scheduled_rate("linear", 0.05, 0.1, 0, 4) == 0.05  # a rate below the minimum stays


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_rises_by_equal_steps_and_leaves_the_rest_to_the_schedule(schedule: Schedule) -> None:
    found = factors(schedule, 20, warmup_steps=5)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5:] == factors(schedule, 15)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [4, 9])
def test_a_training_may_end_within_its_warm_up(schedule: Schedule, warmup_steps: int) -> None:
    assert factors(schedule, 4, warmup_steps) == pytest.approx([step / warmup_steps for step in (1, 2, 3, 4)])


def test_the_first_and_the_last_steps() -> None:
    assert factors("constant", 7) == [1.0] * 7
    # Cosine would be 0 one step after its last; one cycle ends on a ten-thousandth of where it began.
    assert factors("cosine", 4) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    cycle = factors("onecycle", 100)
    assert (cycle[0], cycle[29], cycle[99]) == pytest.approx((0.04, 1.0, 4e-6), rel=1e-6)
    assert max(cycle) == cycle[29]


def test_a_training_of_one_step() -> None:
    assert factors("constant", 1) == factors("cosine", 1) == factors("cosine", 1, warmup_steps=1) == [1.0]
    assert factors("cosine", 1, warmup_steps=10) == [0.1]
    assert factors("onecycle", 1) == pytest.approx([4e-6])

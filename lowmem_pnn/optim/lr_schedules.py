"""Learning-rate schedules: the factor on the learning rate as a pure function of the step, so that resuming needs no state."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "onecycle"]

# Defaults of torch.optim.lr_scheduler.OneCycleLR.
_WARMUP_SHARE = 0.3
_INITIAL_FACTOR = 1 / 25
_FINAL_FACTOR = _INITIAL_FACTOR / 1e4


def lr_factor(schedule: Schedule, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Return the factor on the learning rate at one step.

    With s for `step`, T for `total_steps`, w for `warmup_steps`:

    - `constant`: 1.
    - `linear`: (T - s) / (T - w), from 1 towards 0, which the step after the last would reach.
    - `cosine`: (1 + cos(pi * (s - w) / (T - w))) / 2, from 1 towards 0, which the step after the last would reach: "SGDR: Stochastic
      Gradient Descent with Warm Restarts", Loshchilov & Hutter 2017, equation 5, without restarts.
    - All three after a linear warm-up: (s + 1) / w for s < w. The first step that the schedule itself decides, s = w, has 1, as the last
      one of the warm-up has.
    - `onecycle`: half a cosine from 1/25 up to 1, which is reached at s = 0.3 T - 1, and half a cosine down to 1/250,000 at the last
      step, s = T - 1: "Super-Convergence", Smith & Topin 2018, in the two phases of
      `torch.optim.lr_scheduler.OneCycleLR`. A training of one step is its last.

    Args:
        schedule: name of the schedule.
        step: step of the optimizer, from 0 over the whole training.
        total_steps: number of steps of the training, at least 1.
        warmup_steps: number of steps in which the learning rate first rises; may exceed `total_steps`. Must be 0 with `onecycle`, which
            rises by itself.

    Returns:
        A number above 0 and at most 1.

    Example:
        >>> [lr_factor("cosine", step, 4) for step in (0, 2)]
        [1.0, 0.5]
        >>> [lr_factor("constant", step, 4, warmup_steps=2) for step in range(4)]
        [0.5, 1.0, 1.0, 1.0]
        >>> [round(lr_factor("onecycle", step, 10), 6) for step in (0, 2, 9)]
        [0.04, 1.0, 4e-06]
    """
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    if schedule == "onecycle":
        assert warmup_steps == 0, "one cycle has a warm-up of its own"
        return _one_cycle(step, total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return (total_steps - step) / (total_steps - warmup_steps)
    return _half_cosine(1.0, 0.0, (step - warmup_steps) / (total_steps - warmup_steps))


def scheduled_rate(schedule: Schedule, base: float, minimum: float, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Return the learning rate at one step: minimum + (base - minimum) * factor, as PyTorch's schedulers have it (`eta_min`).

    A warm-up rises from 0, whatever the minimum; a base below the minimum stays what it is.

    Args:
        schedule: name of the schedule.
        base: rate that the factor 1 stands for.
        minimum: rate that the factor 0 stands for.
        step: as for `lr_factor`.
        total_steps: as for `lr_factor`.
        warmup_steps: as for `lr_factor`.

    Example:
        >>> [scheduled_rate("linear", 1.0, 0.5, step, 4) for step in range(4)]
        [1.0, 0.875, 0.75, 0.625]
    """
    factor = lr_factor(schedule, step, total_steps, warmup_steps)
    if minimum == 0 or step < warmup_steps:
        return base * factor
    minimum = min(minimum, base)
    return minimum + (base - minimum) * factor


def _one_cycle(step: int, total_steps: int) -> float:
    # The top need not be a whole number; a training of up to three steps begins above 1/25.
    top, end = _WARMUP_SHARE * total_steps - 1, total_steps - 1
    if step <= top:
        return _half_cosine(_INITIAL_FACTOR, 1.0, step / top)
    return _half_cosine(1.0, _FINAL_FACTOR, (step - top) / (end - top))


def _half_cosine(first: float, last: float, share: float) -> float:
    """Interpolate from `first` to `last`, flat at both ends, as `share` goes from 0 to 1."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))

"""Advice: which method to take in a budget, and why, in a sentence."""

from collections.abc import Mapping, Sequence

from lowmem_pnn.reporting.method_estimate import MethodEstimate
from lowmem_pnn.units import format_bytes, seconds_text

# How many times as fast another training has to be for it to be worth not being ordinary training.
_MUCH_FASTER = 1.5


def plain_fits(plain_bytes: int | None, reserve_bytes: int, budget_bytes: int) -> bool:
    """Return whether plain PyTorch would fit: what its allocator and kernels keep beside its tensors is up to a third of these.

    Args:
        plain_bytes: predicted peak of a plain loop; None where it is not known.
        reserve_bytes: what plans keep free.
        budget_bytes: the budget.
    """
    return plain_bytes is not None and 1.5 * plain_bytes + reserve_bytes <= budget_bytes


def advise(estimates: Sequence[MethodEstimate], *, plain_fits: bool = False) -> str:
    """Say which method to take, and why.

    Args:
        estimates: estimates of all methods, at least one.
        plain_fits: whether plain PyTorch would fit.
    """
    fitting = {estimate.method: estimate for estimate in estimates if estimate.fits}
    if plain_fits:
        return "take plain PyTorch: it fits this budget" + (
            ", or --method backprop, the same training" if "backprop" in fitting else ""
        )
    if not fitting:
        nearest = min((each for each in estimates if each.enough_bytes), key=lambda each: each.enough_bytes or 0, default=None)
        if nearest is None:
            return "no method fits"
        return f"no method fits; the smallest budget is {format_bytes(nearest.enough_bytes or 0)}, with --method {nearest.method}"
    ordinary = min(
        (fitting[name] for name in ("backprop", "exact") if name in fitting),
        key=lambda each: each.seconds_per_epoch,
        default=None,
    )
    local = min(
        (fitting[name] for name in ("pnn", "neuroflux", "incubate") if name in fitting),
        key=lambda each: each.seconds_per_epoch,
        default=None,
    )
    if ordinary is None:
        assert local is not None, "something fits"
        return (
            f"take --method {local.method}: ordinary training does not fit"
            + (", and it is the faster one of those that do" if len(fitting) > 1 else ", and nothing else does")
            + _nearest(fitting, local)
        )
    best = f"take --method {ordinary.method}: ordinary training, {seconds_text(ordinary.seconds_per_epoch)} s an epoch"
    if local is None or local.seconds_per_epoch * _MUCH_FASTER >= ordinary.seconds_per_epoch:
        return best + (", and no other method is much faster" if local is not None else ", and the only one that fits")
    return (
        f"{best}; --method {local.method} takes {seconds_text(local.seconds_per_epoch)} s, but learns each part from a loss of its own, "
        "and reaches less on some networks"
    ) + _nearest(fitting, local)


def _nearest(fitting: Mapping[str, MethodEstimate], local: MethodEstimate) -> str:
    """Say which of the methods that train partitions by themselves lost least where they were measured (`bench/ahead.py`)."""
    if local.method == "incubate" or "incubate" not in fitting:
        return ""
    return (
        f"; --method incubate ({seconds_text(fitting['incubate'].seconds_per_epoch)} s, after its thin model) came nearest to ordinary "
        "training, or ahead of it, where that was measured"
    )

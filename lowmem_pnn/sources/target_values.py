"""Values of targets that are no class numbers: which of them are labels or probabilities, and none that no loss can be taken of."""

import torch
from torch import Tensor

from lowmem_pnn.errors import DataError

_ROUNDING = 1e-3


def zeros_and_ones(y: Tensor) -> Tensor:
    """Return which of some targets are 0 and 1 alone.

    Args:
        y: Targets (N, ...).

    Returns:
        Truth values (N,).
    """
    return ((y == 0) | (y == 1)).reshape(len(y), -1).all(1)


def probabilities(y: Tensor) -> Tensor:
    """Return which of some targets are probabilities, which sum to 1.

    Args:
        y: Targets (N, classes).

    Returns:
        Truth values (N,).
    """
    return ((y >= 0) & (y <= 1)).all(-1) & ((y.to(torch.float64).sum(-1) - 1).abs() < _ROUNDING)


def check_values(y: Tensor, kind: str, where: str, *, batched: bool, remedy: str) -> None:
    """Refuse targets that are not of their kind: where they come one by one, a few of them have shown which it is.

    Args:
        y: Targets (N, ...), float32.
        kind: `labels`, `probabilities` or `values`.
        where: Name of the data in messages; of the sample where there is one.
        batched: Whether they are of many samples.
        remedy: What leaves a broken sample out, in brackets.

    Raises:
        DataError: One is not.
    """
    fits = {"labels": zeros_and_ones, "probabilities": probabilities}
    fit = fits[kind](y) if kind in fits else torch.isfinite(y).reshape(len(y), -1).all(1)
    if bool(fit.all()):
        return
    number = int((~fit).nonzero()[0])
    which = f"the target of sample {number}" if batched else "its target"
    if kind == "values":
        raise DataError(f"{where}: {which} is NaN or infinite; repair it or leave the sample out{remedy}")
    row = y[number]
    wrong = row[~((row == 0) | (row == 1))] if kind == "labels" else row[~((row >= 0) & (row <= 1))]
    holds = f"holds {wrong[0].item():g}" if wrong.numel() else f"sums to {row.sum().item():g}"
    others = "0 and 1 alone" if kind == "labels" else "probabilities, which sum to 1"
    raise DataError(
        f"{where}: {which} {holds}, and others are {others}; mend it, or give --task regression where targets are numbers"
    )

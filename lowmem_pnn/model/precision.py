"""Precision: what layers compute in, and how maps lie in memory. Weights, gradients and the optimizer's state are float32 in any case.

    fp32    as the model is
    bf16    PyTorch's autocast to bfloat16: half the activations, half what crosses boundaries
    fp16    autocast to float16, whose small gradients would vanish: the loss is scaled up, and gradients down before the step

Weights are cast where they are used, and the copies go when backward has had them (`cache_enabled=False`): a copy that outlived its
layer would be memory that no plan knows of.

Maps (B, C, H, W) lie channel by channel, as PyTorch has them by default, or position by position (`channels_last`), which many
convolutions are faster on. Weights stay as they are: a kernel that wants them otherwise makes a copy for the moment.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_pnn.errors import DivergedError

PrecisionName = Literal["fp32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Those of torch.amp.GradScaler.
_FIRST_SCALE = 65536.0
_GROWTH_INTERVAL = 2000
# Below it even gradients of 1 overflow: it is not the scale that makes them infinite.
_LEAST_SCALE = 1 / 65536


@dataclass(frozen=True)
class Precision:
    """How layers compute.

    Args:
        dtype: `fp32`, `bf16` or `fp16`.
        device_type: `cpu` or `cuda`: what is cast differs between them.
        channels_last: maps lie position by position.
    """

    dtype: PrecisionName = "fp32"
    device_type: str = "cpu"
    channels_last: bool = False

    def computing(self) -> AbstractContextManager[Any]:
        """Where forwards run."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, _AUTOCAST[self.dtype], cache_enabled=False)

    def laid_out(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Tensors as layers are to get them: maps as `channels_last` says, others as they are."""
        if not self.channels_last:
            return tensors
        return tuple(tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor for tensor in tensors)


AS_IT_IS = Precision()
"""As the model is."""


@dataclass
class LossScale:
    """The factor that a loss is multiplied by before backward (Micikevicius et al. 2018, section 3.2), moved as PyTorch moves it.

    It halves when a gradient overflows, and that step is left out; it doubles after 2,000 steps without. Always a power of two, so
    that scaling rounds nothing.

    Args:
        value: the factor.
        moves: whether it does; else it is 1, and a step that overflows is the run's fault.
        good_steps: since it last changed.
        skipped: steps that were left out, in all.
    """

    value: float = 1.0
    moves: bool = False
    good_steps: int = 0
    skipped: int = 0

    @classmethod
    def first(cls, precision: PrecisionName) -> "LossScale":
        """What training begins with."""
        return cls(_FIRST_SCALE, moves=True) if precision == "fp16" else cls()

    @property
    def remedy(self) -> str:
        """What to try where a loss is not finite: a scale has no part in it."""
        return "try --precision bf16, or a lower --lr" if self.moves else "try a lower --lr"

    def update(self, *, overflowed: bool) -> None:
        """A step is over.

        Args:
            overflowed: a gradient was not finite, and the step was left out.

        Raises:
            DivergedError: the scale is so small that it cannot be what makes gradients infinite.
        """
        if not self.moves:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value /= 2
            self.skipped += 1
        elif self.good_steps == _GROWTH_INTERVAL:
            self.value *= 2
            self.good_steps = 0
        if self.value < _LEAST_SCALE:
            raise DivergedError(
                f"gradients are not finite in float16, whatever the loss is scaled by; {self.skipped} steps were left out; "
                f"the last commit is kept; {self.remedy}"
            )


def unscale(gradients: Iterable[Tensor], scale: LossScale) -> bool:
    """Take a loss's scale out of gradients again, in place.

    Args:
        gradients: of any shapes.
        scale: that they have.

    Returns:
        Whether all of them are finite; without a scale that moves nobody asks, and it is True.
    """
    if not scale.moves:
        return True
    finite = True
    for gradient in gradients:
        gradient.mul_(1 / scale.value)
        # The sum of finite numbers that are no larger than float16 has them is finite; it takes no memory.
        finite = finite and math.isfinite(float(gradient.sum()))
    return finite

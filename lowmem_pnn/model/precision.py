"""Mixed precision: compute type and memory format of layers, and the loss scale of float16.

    fp32    the model's own types
    bf16    PyTorch's autocast to bfloat16: half the bytes of activations and boundaries
    fp16    autocast to float16, whose small gradients would vanish: the loss is scaled up, and gradients down before the step

Weights, gradients and the optimizer's state are float32, but for what options keep smaller (`--weights-dtype`). Weights are cast where
they are used, and the copies are freed in backward (`cache_enabled=False`): a copy that outlived its layer would be memory that no plan
counts.

Maps (B, C, H, W) lie in memory channel by channel, PyTorch's default, or position by position (`channels_last`), on which many
convolutions are faster. Weights keep their order: a kernel that needs the other one makes a temporary copy.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_pnn.errors import DivergedError

PrecisionName = Literal["fp32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# As in torch.amp.GradScaler.
_INITIAL_SCALE = 65536.0
_GROWTH_INTERVAL = 2000
# Below this scale only gradients that are infinite by themselves overflow.
_SMALLEST_SCALE = 1 / 65536


@dataclass(frozen=True)
class Precision:
    """Compute precision and memory format of layers.

    Args:
        dtype: compute precision, `fp32`, `bf16` or `fp16`.
        device_type: `cpu` or `cuda`: autocast casts other operations on each.
        channels_last: whether maps lie in memory position by position.
    """

    dtype: PrecisionName = "fp32"
    device_type: str = "cpu"
    channels_last: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a layer's forward: autocast, or nothing in fp32."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, _AUTOCAST[self.dtype], cache_enabled=False)

    def to_memory_format(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return a layer's inputs in its memory format: maps in channels-last order if `channels_last`, others unchanged."""
        if not self.channels_last:
            return tensors
        return tuple(tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor for tensor in tensors)


FULL_PRECISION = Precision()
"""The model's own types and memory format."""


@dataclass
class LossScale:
    """The factor on a loss before backward (Micikevicius et al. 2018, section 3.2), adjusted by PyTorch's rule.

    The scale halves when a gradient overflows, and that step is skipped; it doubles after 2,000 steps without an overflow. Always a
    power of two, so that scaling rounds nothing.

    Args:
        value: the factor.
        moves: whether the factor is adjusted; if not, it is 1, and gradients are not checked for overflow.
        good_steps: steps without overflow since the factor last changed.
        skipped: number of skipped steps, in all.
    """

    value: float = 1.0
    moves: bool = False
    good_steps: int = 0
    skipped: int = 0

    @classmethod
    def initial(cls, precision: PrecisionName) -> "LossScale":
        """Return the scale at the start of a training."""
        return cls(_INITIAL_SCALE, moves=True) if precision == "fp16" else cls()

    @property
    def remedy(self) -> str:
        """Advice for a loss that is not finite, whatever the scale."""
        return "try --precision bf16, or a lower --lr" if self.moves else "try a lower --lr"

    def update(self, *, overflowed: bool) -> None:
        """Adjust the scale after a step.

        Args:
            overflowed: whether a gradient was not finite, and the step was skipped.

        Raises:
            DivergedError: gradients overflow at the smallest scale.
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
        if self.value < _SMALLEST_SCALE:
            raise DivergedError(
                f"gradients are not finite in float16, whatever the loss is scaled by; {self.skipped} steps were left out; "
                f"the last commit is kept; {self.remedy}"
            )


UNSCALED = LossScale()
"""The factor 1, which is never adjusted."""


def unscale(gradients: Iterable[Tensor], scale: LossScale) -> bool:
    """Divide gradients by their loss's scale, in place.

    Args:
        gradients: gradients of any shapes.
        scale: scale of the loss.

    Returns:
        Whether all gradients are finite; True, unchecked, where the scale is not adjusted.
    """
    return all_finite(unscaled_sums(gradients, scale))


def unscaled_sums(gradients: Iterable[Tensor], scale: LossScale) -> list[Tensor]:
    """Divide gradients by their loss's scale, in place, and return their sums, which the host need not wait for.

    A sum of finite numbers in the range of float16 is finite, and takes no memory.

    Args:
        gradients: gradients of any shapes.
        scale: scale of the loss.

    Returns:
        A sum () for each gradient, on its device; none where the scale is not adjusted.
    """
    if not scale.moves:
        return []
    return [gradient.mul_(1 / scale.value).sum() for gradient in gradients]


def all_finite(values: Sequence[Tensor]) -> bool:
    """Decide whether numbers on one device are finite; the host waits for them once.

    Args:
        values: numbers (), of any types.
    """
    return not values or bool(torch.stack([value.isfinite() for value in values]).all())

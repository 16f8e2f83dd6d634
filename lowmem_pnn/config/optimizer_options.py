"""Options of the optimizer and of its schedule. No torch here: the command line reads this file to print its help."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from lowmem_pnn.config.field_types import NotNegative
from lowmem_pnn.config.finetuning_options import Patterns


def _pair(value: Any) -> Any:
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and len(parts) != 2:
        raise ValueError("two numbers are needed; write A,B, such as 0.9,0.95")
    return parts


Share = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Share, Share], BeforeValidator(_pair)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class OptimizerOptions:
    """Options of `FitConfig` that are about the optimizer's step."""

    betas: Betas = Field(
        default=(0.9, 0.999), description="Decay of the means of gradients and of their squares, as A,B (adam, adamw)."
    )
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1e-8, description="Number added to the root of the mean square of gradients (adam, adamw)."
    )
    no_decay: Patterns = Field(
        default=None,
        description=(
            "Parameters without weight decay, by patterns of their names, separated by commas; * stands for any text ('*.bias')."
        ),
    )
    no_decay_norms: bool = Field(
        default=False,
        description=("No weight decay for norms and biases: the parameters of one axis, or none, and those called bias."),
    )
    min_lr: NotNegative = Field(
        default=0.0, description="Learning rate that a schedule comes down to (linear, cosine); --lr where that is lower."
    )
    max_steps: PositiveInt | None = Field(
        default=None,
        description=(
            "End training after so many optimizer steps, also in the midst of an epoch (exact, backprop); the schedule counts to it."
        ),
    )

"""Options of when training ends, and which weights it leaves. No torch here: the command line reads this file to print its help."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from lowmem_pnn.units import parse_seconds


def _seconds(value: Any) -> Any:
    return parse_seconds(value) if isinstance(value, str) else value


Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class StoppingOptions:
    """Options of the end of training."""

    early_stop: PositiveInt | None = Field(
        default=None, description="End training when --monitor has not improved for so many epochs (exact, backprop)."
    )
    keep_weights: Literal["last", "best"] = Field(
        default="last",
        description=(
            "Weights that the run leaves: of the last epoch, or of the one that was best by --monitor (exact, backprop). The best are kept "
            "beside the last commit, and survive a kill as it does."
        ),
    )
    monitor: Literal["val_loss", "val_accuracy"] = Field(
        default="val_loss", description="What tells which epoch is best: measured on the validation part after every epoch."
    )
    time_limit: Duration | None = Field(
        default=None,
        description="Time after which training stops at a commit, as on SIGTERM (exit code 75): 90m, 1h30m, 45s. A resume has as much again.",
    )

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
        default=None,
        description=(
            "End training when --monitor has not improved for so many validations (exact, backprop; pnn: the epochs of its last partition, or "
            "of --recovery-epochs; incubate: these)."
        ),
    )
    keep_weights: Literal["last", "best"] = Field(
        default="last",
        description=(
            "Weights that the run leaves: the last, or those that were best by --monitor in the epochs that --early-stop goes by. The best are "
            "kept beside the last commit, and survive a kill as it does."
        ),
    )
    keep_state: bool = Field(
        default=False,
        description=(
            "Keep the optimizer's state in the run's folder when it is done, 8 bytes a parameter with adam, so that fit --resume --epochs N "
            "trains it further (exact, backprop; with a constant learning rate)."
        ),
    )
    monitor: str = Field(
        default="val_loss",
        description=(
            "Score of the validation part that tells what is best: val_loss, val_accuracy, val_f1, val_top5, val_miou, "
            "val_average_precision, val_mse, val_mae, val_r2 or val_perplexity, as the task has them; or max:val_NAME or min:val_NAME of a "
            "metric of your own."
        ),
    )
    eval_every: PositiveInt | None = Field(
        default=None,
        description=(
            "Optimizer steps after which the validation part is measured within an epoch too, not only at its end (exact, backprop; pnn: in "
            "its last partition). --early-stop and --keep-weights best go by all of these."
        ),
    )
    time_limit: Duration | None = Field(
        default=None,
        description="Time after which training stops at a commit, as on SIGTERM (exit code 75): 90m, 1h30m, 45s. A resume has as much again.",
    )

    @property
    def watches(self) -> bool:
        """Whether validation decides when training ends, or which weights are left."""
        return self.early_stop is not None or self.keep_weights == "best"

    @property
    def monitored(self) -> tuple[str | None, str]:
        """What `monitor` says: `min` or `max`, or None where it says neither, and the name of the score."""
        direction, _, name = self.monitor.rpartition(":")
        return direction or None, name

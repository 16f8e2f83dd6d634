"""Options of fine-tuning: where training begins. No torch here."""

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

# What a run trains by where pretrained weights come in and nothing else is asked for.
DEFAULTS_WITH_WEIGHTS: dict[str, Any] = {"method": "exact", "epochs": (3,)}


def _text_of_path(value: Any) -> Any:
    text = str(value) if value is not None else None
    if text == "":
        raise ValueError("there is no file without a name; give default, none, or a path")
    return text


def _patterns(value: Any) -> Any:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
        if not all(value):
            raise ValueError("there is nothing between two commas, or nothing at all; write one pattern, or several as A,B")
    return tuple(value) if isinstance(value, Iterable) else value  # which is refused by name, if it is not None


def _rates(value: Any) -> Any:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    rates = {}
    for text in value:
        pattern, equals, rate = str(text).rpartition("=")
        if not equals or not pattern.strip():
            raise ValueError(f"{text!r} is not PATTERN=X; write, for example, --lr-for 'features.*=1e-4'")
        rates[pattern.strip()] = rate.strip()
    return rates


Rates = Annotated[dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]], BeforeValidator(_rates)]

Patterns = Annotated[tuple[str, ...] | None, BeforeValidator(_patterns)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FineTuningOptions:
    """Options of `FitConfig` that are about fine-tuning."""

    weights: Annotated[str | None, BeforeValidator(_text_of_path)] = Field(
        default=None,
        description=(
            "Pretrained weights that training begins with. default: torchvision's or timm's own, downloaded; for hf: models those that come "
            "with them, also where this option is left out. FILE: safetensors, an index of shards (*.safetensors.index.json), or a "
            "state_dict by torch.save (.pt, .pth, .bin). DIR: a folder with one, such as a run's. none: random values. With weights the "
            "defaults are --method exact and --epochs 3."
        ),
    )

    train_only: Patterns = Field(
        default=None,
        description=(
            "Parameters that learn, by patterns of their names, separated by commas; * stands for any text ('classifier.*'). All others "
            "are frozen, and BatchNorms that are frozen wholly are in eval mode."
        ),
    )
    freeze: Patterns = Field(
        default=None,
        description=(
            "Parameters that do not learn, by patterns of their names, separated by commas; * stands for any text ('features.*'). "
            "BatchNorms that are frozen wholly are in eval mode."
        ),
    )
    freeze_norm: bool = Field(
        default=False,
        description="Keep all BatchNorms in eval mode, with the statistics that they have, and their parameters frozen.",
    )

    unfreeze_at: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description=(
            "Epoch from which what --freeze or --train-only have frozen learns too (exact, backprop), counted from 0: with 1 it is frozen in "
            "the first epoch, and learns from the second one on. --freeze-norm holds for all epochs."
        ),
    )
    lr_for: Rates = Field(
        default_factory=dict,
        description=(
            "Learning rate of the parameters whose names match a pattern, as PATTERN=X ('features.*=1e-4'), in the place of --lr and with "
            "the same schedule; may be repeated, the last that matches counts."
        ),
    )
    cache_frozen: bool = Field(
        default=True,
        description=(
            "Write the outputs of frozen first layers to disk once, and read them in every epoch (exact), where these layers draw nothing "
            "at random, change no buffers, and images are not augmented."
        ),
    )

    @property
    def freezes(self) -> bool:
        """Whether options freeze anything."""
        return bool(self.freezing_flags)

    @property
    def after_unfreezing(self) -> "FineTuningOptions":
        """The options by which the model is frozen in the last epochs."""
        return self if self.unfreeze_at is None else dataclasses.replace(self, freeze=None, train_only=None)

    @property
    def freezing_flags(self) -> list[str]:
        """The options that freeze something, as one would type them."""
        patterns = [("--train-only", self.train_only), ("--freeze", self.freeze)]
        return [
            *(f"{name} {','.join(values)}" for name, values in patterns if values),
            *(["--freeze-norm"] if self.freeze_norm else []),
        ]

    @property
    def has_weights(self) -> bool:
        """Whether training begins with pretrained weights."""
        return self.weights not in (None, "none")

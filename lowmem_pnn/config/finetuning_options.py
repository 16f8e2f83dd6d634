"""Options of fine-tuning: where training begins. No torch here."""

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


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FineTuningOptions:
    """Options of `FitConfig` that are about fine-tuning."""

    weights: Annotated[str | None, BeforeValidator(_text_of_path)] = Field(
        default=None,
        description=(
            "Pretrained weights that training begins with. default: torchvision's or timm's own, downloaded. FILE: safetensors, an index "
            "of shards (*.safetensors.index.json), or a state_dict by torch.save (.pt, .pth, .bin). DIR: a folder with one, such as a "
            "run's. none: random values. With weights the defaults are --method exact and --epochs 3."
        ),
    )

    @property
    def has_weights(self) -> bool:
        """Whether training begins with pretrained weights."""
        return self.weights not in (None, "none")

"""Options of methods that give partitions losses of their own. No torch here: the command line reads this file to print its help."""

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LocalOptions:
    """Options of `FitConfig` that are about what partitions learn by themselves."""

    meta_epochs: PositiveInt | None = Field(
        default=None,
        description=(
            "Epochs of the meta model, one thin part a partition, inside of which partitions learn (incubate); by default as many as "
            "--epochs."
        ),
    )

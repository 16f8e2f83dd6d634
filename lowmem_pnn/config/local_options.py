"""Options of methods that give partitions losses of their own. No torch here: the command line reads this file to print its help."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LocalOptions:
    """Options of `FitConfig` that are about what partitions learn by themselves."""

    local_loss: Literal["cross-entropy", "similarity", "both"] = Field(
        default="cross-entropy",
        description=(
            "What every layer learns from (neuroflux). cross-entropy: the class scores of its head. similarity: which samples of a batch "
            "are of one class; heads learn beside it, as exits. both: 0.99 of the loss similarity, 0.01 cross entropy."
        ),
    )

    meta_epochs: PositiveInt | None = Field(
        default=None,
        description=(
            "Epochs of the meta model, one thin part a partition, inside of which partitions learn (incubate); by default as many as "
            "--epochs."
        ),
    )

    visits: Annotated[str, Field(pattern=r"^(sequential|interleaved|laps=[1-9]\d*)$")] = Field(
        default="sequential",
        description=(
            "Order in which blocks take turns. sequential: all epochs of one block, then the next. laps=L: the same L times over, with an "
            "L-th of the epochs each. interleaved: macro-batch by macro-batch."
        ),
    )
    macro_batches: PositiveInt = Field(
        default=64,
        description=(
            "Batches of a macro-batch, which go through one block before the next block takes them (--visits interleaved); with "
            "--batch-size auto, batches of 512 samples."
        ),
    )

    @property
    def laps(self) -> int:
        """How often all blocks take their turn."""
        return int(self.visits.partition("=")[2] or 1)

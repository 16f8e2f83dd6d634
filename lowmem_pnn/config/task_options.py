"""Options of the task: what is predicted, by which loss. No torch here: the command line reads this file to print its help."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from lowmem_pnn.config.field_types import Positive
from lowmem_pnn.config.transformers_place import TRANSFORMERS_TASKS


def _weights(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value == "balanced"):  # an array is no word, and compares element by element
        return value
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, Iterable) else value  # which is refused by name


Task = Literal[
    "auto", "classification", "multilabel", "regression", "segmentation",
    "causal-lm", "masked-lm", "seq2seq", "sequence-classification", "image-classification",
]  # fmt: skip

TargetTask = Literal["auto", "classification", "multilabel", "regression", "segmentation"]

ClassWeights = Annotated[tuple[Positive, ...] | Literal["balanced"] | None, BeforeValidator(_weights)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TaskOptions:
    """Options of the task."""

    task: Task = Field(
        default="auto",
        description=(
            "What is predicted. auto: what the targets of the data look like. classification: one class for each sample, or token. "
            "multilabel: 0 or 1 for each of several labels. regression: numbers. segmentation: a class for each pixel. For hf: models the "
            "head, by default that of their configuration: causal-lm, masked-lm, seq2seq, sequence-classification, image-classification."
        ),
    )
    loss: Annotated[str, Field(pattern=r"^(auto|cross-entropy|bce|mse|l1|smooth-l1|huber|[^:]+:.+)$")] = Field(
        default="auto",
        description=(
            "Loss. auto: cross-entropy for classes, bce for several labels, mse for numbers. For numbers also l1, smooth-l1 and huber. "
            "file.py:function or package.module:function: a function of the model's outputs and the targets, which returns the mean over "
            "samples, or a sum and the count that it is over."
        ),
    )
    class_weights: ClassWeights = Field(
        default=None,
        description=(
            "Weights of the classes in the loss (of several labels: of the samples that have them). balanced: by how rare each is in the "
            "training data."
        ),
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Smoothing of the true labels in the training loss."
    )
    ignore_index: int | None = Field(
        default=None,
        description="Class number that loss and scores leave out; by default -100, as in PyTorch, and 255 in masks.",
    )

    @property
    def target_task(self) -> TargetTask:
        """What the targets of the data are said to be; what a head of transformers is for, they show themselves."""
        return "auto" if self.task in TRANSFORMERS_TASKS else cast(TargetTask, self.task)

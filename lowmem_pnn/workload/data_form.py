"""The form of a run's samples and targets, as its result keeps it: what a trained model takes and gives, without the data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.sources.splits import Indices, as_indices
from lowmem_pnn.sources.targets import Targets


@dataclass(frozen=True)
class DataForm:
    """What a run knows of its data once the samples are away.

    Args:
        inputs: Tensors of one sample, as the model takes them.
        structure: Structure of these, where they are several; None where a sample is one tensor.
        targets: Form of the targets.
        classes: Names of the classes, or of the labels; empty where nobody has named them.
        class_weights: Weights of the classes in the loss, which may have been found from the data; empty where they count alike.
    """

    inputs: tuple[TensorSpec, ...]
    structure: pytree.TreeSpec | None
    targets: Targets
    classes: tuple[str, ...]
    class_weights: tuple[float, ...] = ()

    @classmethod
    def of(cls, dataset: Dataset, class_weights: tuple[float, ...] = ()) -> "DataForm":
        """Return the form of a data set.

        Args:
            dataset: The data set, as the model sees it.
            class_weights: Weights of the classes in the loss.
        """
        inputs = dataset.inputs if dataset.structure is not None else (TensorSpec(dataset.sample_shape, dataset.dtype),)
        return cls(tuple(inputs), dataset.structure, dataset.targets, tuple(dataset.classes), class_weights)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it; empty where a sample is of a structure that JSON cannot hold."""
        try:
            structure = None if self.structure is None else pytree.treespec_dumps(self.structure)
        # Of structures that hold classes of the user's own.
        except (NotImplementedError, TypeError):
            return {}
        targets = self.targets
        return {
            "inputs": [{"shape": list(spec.shape), "dtype": _name(spec.dtype)} for spec in self.inputs],
            "structure": structure,
            "targets": {
                "kind": targets.kind,
                "num_classes": targets.num_classes,
                "shape": list(targets.shape),
                "dtype": _name(targets.dtype),
                "ignored": targets.ignored,
            },
            "classes": list(self.classes),
            "class_weights": list(self.class_weights),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataForm":
        """Read what `to_dict` made.

        Args:
            values: The dictionary.

        Raises:
            ValueError, TypeError, LookupError, AttributeError: It is none.
        """
        kept = values["targets"]
        # Targets of the user's own are read by nobody once the model is trained.
        shape = () if kept["kind"] == "own" else tuple(kept["shape"])
        dtype = torch.int64 if kept["kind"] == "own" else _dtype(kept["dtype"])
        return cls(
            tuple(TensorSpec(tuple(spec["shape"]), _dtype(spec["dtype"])) for spec in values["inputs"]),
            None if values["structure"] is None else pytree.treespec_loads(values["structure"]),
            Targets(kept["kind"], int(kept["num_classes"]), shape, dtype, kept["ignored"]),
            tuple(map(str, values["classes"])),
            tuple(map(float, values.get("class_weights", ()))),  # of an earlier version none
        )

    def dataset(self, name: str, targets: Targets | None = None) -> Dataset:
        """Return a data set of this form whose samples are zeros.

        Args:
            name: Name of the data set.
            targets: Form of its targets; None for that of the run's.
        """
        targets = self.targets if targets is None else targets
        first = self.inputs[0]
        return Dataset(
            name=name,
            train=ZeroSplit(self, targets),
            test=None,
            targets=targets,
            sample_shape=first.shape,
            dtype=first.dtype,
            preprocessing="",
            fingerprint="",
            classes=self.classes,
            inputs=self.inputs if self.structure is not None else (),
            structure=self.structure,
        )

    def __str__(self) -> str:
        return " and ".join(f"{tuple(spec.shape)} {_name(spec.dtype)}" for spec in self.inputs)


class ZeroSplit:
    """Split of samples that are zeros: it shows what samples are like, where there are none.

    Args:
        form: Form of the samples.
        targets: Form of the targets.
    """

    def __init__(self, form: DataForm, targets: Targets) -> None:
        self._form, self._targets = form, targets

    def __len__(self) -> int:
        return 2

    def batch(self, indices: Indices) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Return samples and targets, as `Split.batch` does."""
        count = len(as_indices(indices, len(self)))
        tensors = tuple(torch.zeros(count, *spec.shape, dtype=spec.dtype) for spec in self._form.inputs)
        return tensors[0] if self._form.structure is None else tensors, self._targets.zeros(count)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no type of numbers")
    return found

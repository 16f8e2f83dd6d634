"""Splits of samples of several tensors: a tuple or a dictionary of them at each index, or of arrays (N, ...)."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowmem_pnn.errors import DataError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.arrays import as_tensor, hash_tensor
from lowmem_pnn.sources.draws import DrawKey, SampleReader
from lowmem_pnn.sources.given import as_sample
from lowmem_pnn.sources.preprocessing import Preprocessing
from lowmem_pnn.sources.splits import Indices, SampleSplit, as_indices, of_all, require_samples, what_is_not_finite
from lowmem_pnn.sources.targets import TargetOptions, Targets, find_targets


class StructuredSplit(SampleSplit):
    """Split of samples of several tensors.

    Args:
        dataset: Data set with `__getitem__`, which gives a sample, a structure of tensors, and its target. What it draws at random
            follows from the key of a reading.
        num_samples: Number of samples.
        where: Name of the split in messages.
        options: What is known of the targets.
    """

    structure: pytree.TreeSpec

    def __init__(
        self,
        dataset: Any,
        num_samples: int,
        where: str,
        options: TargetOptions = TargetOptions(),  # noqa: B008
    ) -> None:
        require_samples(num_samples, where)
        super().__init__(num_samples)
        self.where, self._reader = where, SampleReader(dataset, num_samples)
        first, self.structure, _ = self._leaves(0)
        self.forms = tuple(
            Preprocessing.choose(tuple(tensor.shape), tensor.dtype, "any", f"{where}, {name}")
            for name, tensor in zip(self.names, first, strict=True)
        )
        self.preprocessing = self.forms[0]
        with self._reader.noticing():
            self.targets = self._find_targets(options)
        self.is_random, self.uses_generators = self._reader.is_random, self._reader.uses_generators

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """See `SampleSplit.inputs`."""
        return tuple(TensorSpec(form.shape, form.dtype) for form in self.forms)

    @property
    def names(self) -> list[str]:
        """Names of a sample's tensors: their places in the structure."""
        numbered = pytree.tree_unflatten(list(range(self.structure.num_leaves)), self.structure)
        return [pytree.keystr(path) or "the sample" for path, _ in pytree.tree_flatten_with_path(numbered)[0]]

    def batch(self, indices: Indices, key: DrawKey | None = None) -> tuple[tuple[Tensor, ...], Tensor]:  # type: ignore[override]
        """Return the tensors of samples, each (B, ...), in the order of the structure, and their targets; see `Split.batch`.

        Args:
            indices: Numbers of B samples.
            key: What the data set draws at random follows from this and a sample's number; None for the same samples always.
        """
        numbers = self._kept[as_indices(indices, len(self))]
        read = [self._sample(int(number), key) for number in numbers]
        inputs = []
        for place, form in enumerate(self.forms):
            x = form(torch.stack([tensors[place] for tensors, _ in read]))
            if form.raw_dtype.is_floating_point and not bool(torch.isfinite(x).all()):
                row = int((~torch.isfinite(x).reshape(len(x), -1).all(1)).nonzero()[0])
                raise DataError(
                    f"sample {numbers[row]} of {self.where}, {self.names[place]}, holds {what_is_not_finite(x[row])}; repair it or leave it out"
                )
            inputs.append(x)
        targets = torch.stack([target for _, target in read])
        if self.targets.are_classes:
            self._check_classes(targets, "label", numbers, self.targets.ignored)
        return tuple(inputs), targets

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """See `SampleSplit.labels`."""
        return torch.stack([self._sample(int(number))[1] for number in self._kept[numbers]])

    def fingerprint(self) -> str:
        """Return a hash of the length and of a few evenly spaced samples.

        Raises:
            DataError: A sample differs when it is read again.
        """
        digest = hashlib.sha256(f"{len(self)}{self.names}".encode())
        for tensors in self._read_twice(self._all_tensors):
            for tensor in tensors:
                hash_tensor(digest, tensor)
        return digest.hexdigest()

    def _find_targets(self, options: TargetOptions) -> Targets:
        """Find out what targets are, of a few samples; how many classes there are, of all."""
        raw = [self._read(number)[1] for number in self._probes()]
        if options.task == "own":
            trees = [
                pytree.tree_map(lambda leaf: as_tensor(leaf, f"the targets of {self.where}", palette=True), one) for one in raw
            ]
            whole = pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
            return find_targets(whole, self.where, options, (), tokens=False)
        labels = [as_tensor(one, f"the labels of {self.where}", palette=True) for one in raw]
        # One of another shape is refused by name when it is read.
        stacked = torch.stack([one for one in labels if one.shape == labels[0].shape])
        # A label for each token of one of the tensors: that of a text, or of the text that a decoder has written so far.
        labelled = tuple(stacked.shape[1:])
        of_tokens = any(form.dtype == torch.int64 and form.shape == labelled for form in self.forms) and len(labelled) == 1
        shape = labelled if of_tokens else self.forms[0].shape
        found = find_targets(stacked, self.where, options, shape, tokens=of_tokens, are_all=False)
        if not found.are_classes:
            return found
        return of_all(
            found, (found.convert(self._read(n)[1], f"sample {n} of {self.where}", batched=False) for n in range(len(self)))
        )

    def _read(self, number: int, key: DrawKey | None = None) -> tuple[Any, Any]:
        """Return a sample, a structure of tensors, and its target, as they are given."""
        return as_sample(self._reader.read(number, key), f"sample {number} of {self.where}")

    def _leaves(self, number: int, key: DrawKey | None = None) -> tuple[list[Tensor], pytree.TreeSpec, Any]:
        """Return the tensors of a sample, their structure, and its target as it is given."""
        sample, target = self._read(number, key)
        leaves, tree = pytree.tree_flatten(sample)
        return [as_tensor(leaf, f"sample {number} of {self.where}") for leaf in leaves], tree, target

    def _sample(self, number: int, key: DrawKey | None = None) -> tuple[list[Tensor], Tensor]:
        tensors, tree, target = self._leaves(number, key)
        where = f"sample {number} of {self.where}"
        expected = [(form.raw_shape, form.raw_dtype) for form in self.forms]
        if tree != self.structure or [(tuple(tensor.shape), tensor.dtype) for tensor in tensors] != expected:
            found = ", ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors)
            raise DataError(f"{where} is of another form than sample 0 (it holds {found}); give all samples one form")
        return tensors, self.targets.convert(target, where, batched=False)

    def _all_tensors(self, number: int) -> list[Tensor]:
        tensors, target = self._sample(number)
        return [*tensors, target]


def from_structured_arrays(x: Any, y: Any, where: str, options: TargetOptions = TargetOptions()) -> StructuredSplit:  # noqa: B008
    """Make a split of several arrays that are in memory.

    Args:
        x: Tuple or dictionary of arrays, each (N, ...).
        y: Targets (N, ...), or a structure of them.
        where: Name of the split in messages.
        options: What is known of the targets.

    Raises:
        DataError: They are of different lengths.
    """
    arrays = pytree.tree_map(lambda leaf: as_tensor(leaf, where), x)
    targets = pytree.tree_map(
        lambda leaf: as_tensor(leaf, f"the labels of {where}"), y if isinstance(y, dict | tuple) else as_tensor(y, where)
    )
    lengths = {len(leaf) for leaf in (*pytree.tree_leaves(arrays), *pytree.tree_leaves(targets))}
    if len(lengths) != 1:
        raise DataError(
            f"{where}: arrays have {' and '.join(map(str, sorted(lengths)))} samples; give as many of each, and targets as many"
        )

    return StructuredSplit(_Rows(arrays, targets), lengths.pop(), where, options)


class _Rows:
    """Data set of rows of arrays that are in memory."""

    def __init__(self, arrays: Any, targets: Any) -> None:
        self._arrays, self._targets = arrays, targets

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        return tuple(pytree.tree_map(lambda leaf: leaf[number], whole) for whole in (self._arrays, self._targets))


def is_structured(sample: Any) -> bool:
    """Decide whether a sample is a structure of several tensors, and not one tensor, array, image or list of numbers."""
    if isinstance(sample, dict):
        return bool(sample)
    return (
        isinstance(sample, tuple)
        and any(not isinstance(part, int | float) for part in sample)
        and not hasattr(sample, "__array__")
    )

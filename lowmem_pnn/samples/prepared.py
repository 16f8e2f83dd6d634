"""A prepared split: samples of a data set, drawn anew or augmented where they are for training, and normalised."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lowmem_pnn.samples.augment import AugmentationKey, Augmenter
from lowmem_pnn.samples.normalization import Normalization
from lowmem_pnn.sources.splits import Indices, Split, read_samples
from lowmem_pnn.sources.subsets import as_floats, labels_of

_PIECE_BYTES = 1 << 20
_WHOLE = 1 << 62


class PreparedSplit:
    """Split whose samples are augmented, where a key is given, and then normalised.

    Args:
        base: The samples as the data set gives them.
        augmenter: Augments them; None where there are no training samples, or nothing to do.
        normalization: Normalises them; None to leave values as they are.
        masks_outside: Class number of what comes into a mask from outside of its image, where targets are masks; they are cropped and
            flipped as their images are.
        draws_seed: Seed of the run, where the data set has random transforms of its own, which draw anew for each key: a sample is what
            the data set gives after the generators of torch, numpy and Python were seeded with `seed_of(seed, "sample", *key, number)`.
            None where it is the same for all keys.
    """

    def __init__(
        self,
        base: Split,
        augmenter: Augmenter | None,
        normalization: Normalization | None,
        masks_outside: int | None = None,
        draws_seed: int | None = None,
    ) -> None:
        self.base, self._augmenter, self._normalization, self._outside = base, augmenter, normalization, masks_outside
        self._draws_seed = draws_seed

    def __len__(self) -> int:
        return len(self.base)

    def batch(self, indices: Indices, key: AugmentationKey | None = None) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Return samples and labels, as `Split.batch` does.

        Args:
            indices: Numbers of B samples.
            key: Word and number that name an epoch, or a view, for samples that are drawn or augmented; None for samples as they are.
        """
        draws = None if key is None or self._draws_seed is None else (self._draws_seed, "sample", *key)
        x, labels = read_samples(self.base, indices, draws)
        if key is not None and self._augmenter is not None:
            assert isinstance(x, Tensor), "samples of several tensors are not augmented"
            numbers = np.asarray(indices, dtype=np.int64)
            x = self._augmenter(x, numbers, key)
            if self._outside is not None:
                labels = self._augmenter.masks(labels, numbers, key, self._outside)
        if self._normalization is not None:
            assert isinstance(x, Tensor), "samples of several tensors are not normalised"
            x = self._normalization(x)
        return x, labels

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Return targets (B, ...) alone, of samples by their numbers."""
        return labels_of(self.base, numbers)

    def as_floats(self) -> "PreparedSplit":
        """Return the same split with integer samples as float32."""
        return PreparedSplit(as_floats(self.base), self._augmenter, self._normalization, self._outside, self._draws_seed)


class BatchReader:
    """Reads batches of a split in pieces, into memory for them alone: on its way a sample takes two to four times its bytes.

    Args:
        split: A split, prepared or not.
    """

    def __init__(self, split: Any) -> None:
        self._split = split
        # Readers in processes of their own have a batch divided among them, and send it into its place.
        self._piece = None if getattr(split, "readers", None) is None else _WHOLE

    def read(self, indices: Indices, key: AugmentationKey | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the tensors of samples, each (B, ...), and targets (B, ...), augmented where samples can and a key is given.

        Args:
            indices: Numbers of B samples.
            key: Word and number that name an epoch, or a view; None for samples as they are.
        """
        whole: list[Tensor] = []
        begin = 0
        while begin < len(indices):
            piece = self._piece_of(indices[begin : begin + (self._piece or 1)], key)
            if self._piece is None:
                *first, _ = piece
                self._piece = max(1, _PIECE_BYTES // max(1, sum(tensor.nbytes for tensor in first)))
            if len(piece[0]) == len(indices):
                whole = list(piece)
                break
            whole = whole or [tensor.new_empty((len(indices), *tensor.shape[1:])) for tensor in piece]
            for place, tensor in zip(whole, piece, strict=True):
                place[begin : begin + len(tensor)] = tensor
            begin += len(tensor)
            del piece, place, tensor  # or it would be there while the next is read
        *samples, labels = whole
        return tuple(samples), labels

    def _piece_of(self, indices: Indices, key: AugmentationKey | None) -> tuple[Tensor, ...]:
        samples, labels = read_samples(self._split, indices, key)
        return (*samples, labels) if isinstance(samples, tuple) else (samples, labels)

"""Token rows: samples of a language model from mapped tokens, each with the token after every input as its label."""

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from lowmem_pnn.errors import DataError
from lowmem_pnn.language.packing import Form
from lowmem_pnn.language.token_cache import TokenCache
from lowmem_pnn.sources.draws import DrawKey
from lowmem_pnn.sources.splits import Indices, Split, as_indices, read_samples
from lowmem_pnn.sources.subsets import WrappedSplit, labels_of
from lowmem_pnn.sources.targets import PYTORCH_IGNORED

INPUT_NAMES: dict[Form, tuple[str, ...]] = {
    "windows": ("input_ids",),
    "padded": ("input_ids", "attention_mask"),
    "packed": ("input_ids", "position_ids"),
}
"""What models call the tensors of a sample whose labels are the tokens that come next."""


class TokenRows:
    """Split of some rows of a cache.

    Args:
        cache: Tokens, and how they make rows.
        context: Inputs of a row, T.
        form: How rows are filled.
        padding: Token that rows are filled up with.
        first: Number of the first row.
        num_rows: Number of rows.
    """

    def __init__(self, cache: TokenCache, context: int, form: Form, padding: int, first: int, num_rows: int) -> None:
        self._cache, self._context, self._form, self._padding = cache, context, form, padding
        self._first, self._num_rows = first, num_rows

    def __len__(self) -> int:
        return self._num_rows

    def batch(self, indices: Indices) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return rows, and for each input the next token as its label.

        Args:
            indices: Numbers of B rows.

        Returns:
            Tensors (B, T) as `INPUT_NAMES` has them, and labels (B, T), -100 where nothing is learnt; all int64.
        """
        numbers = as_indices(indices, len(self)) + self._first
        shape = (len(numbers), self._context)
        tokens, labels = np.full(shape, self._padding, dtype=np.int64), np.full(shape, PYTORCH_IGNORED, dtype=np.int64)
        # Padding is a document of its own.
        mask, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, number in enumerate(numbers):
            begin = 0
            for start, size in self._pieces(int(number)):
                end = begin + size
                self._fill(tokens[row, begin:end], labels[row, begin:end], start, size)
                mask[row, begin:end] = 1
                positions[row, begin:end] = np.arange(size)
                begin = end
            positions[row, begin:] = np.arange(self._context - begin)
        named = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        return tuple(torch.from_numpy(named[name]) for name in INPUT_NAMES[self._form]), torch.from_numpy(labels)

    def _pieces(self, number: int) -> list[tuple[int, int]]:
        cache, context = self._cache, self._context
        if self._form == "windows":
            return [(number * context, context)]
        begin = int(cache.rows[number])
        end = int(cache.rows[number + 1]) if number + 1 < len(cache.rows) else len(cache.pieces)
        return [(int(start), int(size)) for start, size in cache.pieces[begin:end]]

    def _fill(self, tokens: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], start: int, size: int) -> None:
        cache = self._cache
        read = cache.tokens[start : start + size + 1].astype(np.int64)
        tokens[:] = read[:-1]
        labels[:] = (
            read[1:]
            if cache.counted is None
            else np.where(cache.counted[start + 1 : start + size + 1], read[1:], PYTORCH_IGNORED)
        )


class ChosenInputs(WrappedSplit):
    """Split with some of the tensors of another split's samples: those that a model takes.

    Args:
        base: Split whose samples are several tensors.
        places: Numbers of the tensors that are left.
        as_one: Whether the only one is given by itself, and not in a tuple.
        mask: Number of an `attention_mask` that is left out, since rows are padded at their end; None where there is none.
    """

    def __init__(self, base: Split, places: tuple[int, ...], *, as_one: bool, mask: int | None = None) -> None:
        super().__init__(base)
        self._places, self._as_one, self._mask = places, as_one, mask

    def batch(self, indices: Indices, key: DrawKey | None = None) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Return samples and labels, as `Split.batch` does.

        Raises:
            DataError: A mask that is left out hides a token before others.
        """
        tensors, labels = read_samples(self.base, indices, key)
        assert isinstance(tensors, tuple), "samples are several tensors"
        if self._mask is not None:
            mask = tensors[self._mask]
            hidden = (mask[:, 1:] > mask[:, :-1]).any(1) if mask.ndim == 2 else torch.ones(len(mask), dtype=torch.bool)
            if bool(hidden.any()):
                number = np.asarray(indices)[int(hidden.nonzero()[0, 0])]
                raise DataError(
                    f"the attention_mask of sample {number} hides tokens before others, and the model is given none; pad rows at their end"
                )
        chosen = tuple(tensors[place] for place in self._places)
        return chosen[0] if self._as_one else chosen, labels

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Return labels (B, ...) alone, of samples by their numbers."""
        return labels_of(self.base, numbers)


def choose_inputs(split: Split, given: TreeSpec | None, wanted: TreeSpec | None) -> tuple[Split, tuple[int, ...]] | None:
    """Return samples with some of their named tensors.

    Args:
        split: Samples of several tensors.
        given: Structure of these, a dictionary by name.
        wanted: Structure of what is left; None for `input_ids` alone, as one tensor.

    Returns:
        The samples, and the numbers of the tensors that are left; None where the structure is as wanted, or no part of it is.
    """
    if given is None or given == wanted:
        return None
    names = given.unflatten([*range(given.num_leaves)])
    kept = {"input_ids": 0} if wanted is None else wanted.unflatten([*range(wanted.num_leaves)])
    if not isinstance(names, dict) or not isinstance(kept, dict) or not set(kept) <= set(names):
        return None
    places = tuple(names[name] for name in kept)
    return ChosenInputs(split, places, as_one=wanted is None, mask=left_out_mask(names, kept)), places


def left_out_mask(places: Mapping[str, int], taken: Collection[str]) -> int | None:
    """Return the number of the `attention_mask` where it is not among the tensors that are taken.

    Args:
        places: Numbers of the tensors of a sample, by name.
        taken: Names of those that are taken.
    """
    return None if "attention_mask" in taken else places.get("attention_mask")

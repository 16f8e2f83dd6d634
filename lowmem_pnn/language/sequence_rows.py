"""Rows of whole texts: a text with its class, and a source with the target that is to be written after reading it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.language.token_cache import TokenCache
from lowmem_pnn.sources.splits import Indices, as_indices
from lowmem_pnn.sources.targets import PYTORCH_IGNORED

LABELLED_NAMES = ("input_ids", "attention_mask")
"""What models call the tensors of a text that is to be classified."""
PAIR_NAMES = ("input_ids", "attention_mask", "decoder_input_ids")
"""What models call the tensors of a source, and of the target up to each of its tokens."""


class LabelledRows:
    """Split of texts with a class for each.

    Args:
        cache: Tokens of the texts.
        context: Inputs of a row, T; shorter texts are padded at their end.
        padding: Token that rows are filled up with.
        classes: Class number of each of the cache's `found_labels`; none where the texts have no classes, which are then 0.
    """

    def __init__(self, cache: TokenCache, context: int, padding: int, classes: Sequence[int]) -> None:
        self._cache, self._context, self._padding = cache, context, padding
        self._classes = np.array([*classes], dtype=np.int64)

    @property
    def has_labels(self) -> bool:
        """Whether the texts have classes."""
        return self._cache.labels is not None

    @property
    def largest_token(self) -> int:
        """Largest number of a token that rows have, be it that of padding."""
        return max(self._padding, int(self._cache.tokens.max(initial=0)))

    def __len__(self) -> int:
        return len(self._cache.rows)

    def batch(self, indices: Indices) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return texts and their classes.

        Args:
            indices: Numbers of B rows.

        Returns:
            Tensors (B, T) as `LABELLED_NAMES` has them, and class numbers (B,); all int64.
        """
        numbers = as_indices(indices, len(self))
        tokens, mask = padded(self._cache, self._cache.rows[numbers], self._context, self._padding)
        return (torch.from_numpy(tokens), torch.from_numpy(mask)), self.labels(numbers)

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Return class numbers (B,) alone, of rows by their numbers."""
        if self._cache.labels is None:
            return torch.zeros(len(numbers), dtype=torch.int64)
        return torch.from_numpy(self._classes[self._cache.labels[numbers]])


class PairRows:
    """Split of sources with the target of each.

    Args:
        cache: Tokens of both.
        context: Tokens of a source, S; shorter ones are padded at their end.
        target_context: Labels of a target, T; beyond its end they are -100.
        padding: Token that rows are filled up with.
        start: Token that a decoder begins with.
    """

    def __init__(self, cache: TokenCache, context: int, target_context: int, padding: int, start: int) -> None:
        self._cache, self._contexts = cache, (context, target_context)
        self._padding, self._start = padding, start

    def __len__(self) -> int:
        return len(self._cache.rows)

    def batch(self, indices: Indices) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return sources, targets moved on by one token, and the targets as labels.

        Args:
            indices: Numbers of B rows.

        Returns:
            Tensors (B, S), (B, S) and (B, T) as `PAIR_NAMES` has them, and labels (B, T), -100 beyond their end; all int64.
        """
        first = self._cache.rows[as_indices(indices, len(self))]
        tokens, mask = padded(self._cache, first, self._contexts[0], self._padding)
        targets, is_target = padded(self._cache, first + 1, self._contexts[1], self._padding)
        moved = np.concatenate([np.full((len(targets), 1), self._start), targets[:, :-1]], 1)
        labels = np.where(is_target > 0, targets, PYTORCH_IGNORED)
        return tuple(torch.from_numpy(one) for one in (tokens, mask, moved)), torch.from_numpy(labels)


def padded(
    cache: TokenCache, pieces: npt.NDArray[np.int64], length: int, padding: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return pieces of a cache, padded at their end, and where they are: two arrays (B, length).

    Args:
        cache: The cache.
        pieces: Numbers of B pieces.
        length: Tokens of a row.
        padding: Token that rows are filled up with.
    """
    tokens = np.full((len(pieces), length), padding, dtype=np.int64)
    mask = np.zeros_like(tokens)
    for row, (start, size) in enumerate(cache.pieces[pieces]):
        tokens[row, :size] = cache.tokens[start : start + size]
        mask[row, :size] = 1
    return tokens, mask

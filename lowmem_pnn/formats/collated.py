"""Collation: samples as a data loader's `collate_fn` makes them, each by itself, or padded as beside the longest samples of the data."""

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lowmem_pnn.errors import DataError, LowMemError
from lowmem_pnn.seeds import host_seeded, random_generators, seed_of
from lowmem_pnn.sources.draws import FIXED, DrawKey, probes_of, same_values
from lowmem_pnn.sources.imports import one_line

Collate = Callable[[list[Any]], Any]

# Samples at most that are remembered for changing the random generators: where many do, a few show it.
_MOST_DRAWING = 16


class CollatedDataset:
    """Data set whose samples have gone through a loader's `collate_fn`, each alone.

    Where samples differ in length, and the function pads a batch to its longest sample, each goes through it beside the longest samples of
    the data: so all are padded alike, in the function's own way.

    Args:
        dataset: Map-style data set.
        collate: Makes a batch of a list of samples.
        where: Name of the data in messages.

    Raises:
        DataError: It makes something else of samples together than of each alone, other than padding, as mixing does; or the lengths of
            samples are drawn at random.
    """

    def __init__(self, dataset: Any, collate: Collate, where: str) -> None:
        self._dataset, self._collate, self._where = dataset, collate, where
        self.numbers_that_draw: list[int] = []
        """Numbers of a few samples that change the global random generators as they are read."""
        self._looked_at: list[Any] = []
        # What the function draws here follows from nothing, and changes nothing, outside.
        with host_seeded(seed_of(*FIXED)):
            longest, forms = self._read_all()
            self.pads = len(forms) > 1
            """Whether samples are padded to the longest of the data, since they differ in length."""
            self.longest = longest if self.pads else self._looked_at[:1]
            """Items of the data set whose tensors are the longest."""
            self._check_lengths()
            self._check()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._sample(self._dataset[index])

    def pad_to(self, longest: Sequence[Any]) -> None:
        """Pad samples to the longest of other data.

        Args:
            longest: Items of these, and of this data set.
        """
        self.pads, self.longest = True, list(longest)
        with host_seeded(seed_of(*FIXED)):
            self._check()

    @property
    def padding_note(self) -> str:
        """What is said of samples that are padded."""
        shapes = dict.fromkeys(tuple(leaf.shape) for leaf in pytree.tree_leaves(self._sample(self.longest[0])) if leaf.ndim)
        text = (
            f"collate_fn pads samples to the longest of the data, {' and '.join(map(str, shapes))}, not of each batch: losses are the same "
            "where masks, and labels that are left out, hide what is padded"
        )
        if not _all_alike(
            _begins_with, [self._sample(item) for item in self._looked_at], [self._first([item]) for item in self._looked_at]
        ):
            text += "; it comes before the samples, so that positions which a model counts from there are others"
        return text

    def _items(self, number: int, key: DrawKey = FIXED) -> list[Any]:
        """Return an item of the data set; none where it cannot be read, which is said where it is wanted."""
        with suppress(Exception), host_seeded(seed_of(*key, number)):
            before = random_generators()
            item = self._dataset[number]
            if (
                number not in self.numbers_that_draw
                and len(self.numbers_that_draw) < _MOST_DRAWING
                and random_generators() != before
            ):
                self.numbers_that_draw.append(number)
            return [item]
        return []

    def _shapes(self, item: Any) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(self._first([item])))

    def _read_all(self) -> tuple[list[Any], set[Any]]:
        """Read every sample once, and keep a few: where a text is cut at a length, most have it, and few are shorter.

        Returns:
            The items of which some tensor is the longest along some axis, and all shapes that samples have.
        """
        count = len(self._dataset)
        evenly_spaced = {0, 1, *probes_of(count)} if count else set()
        most: dict[tuple[int, int], tuple[int, Any]] = {}
        forms: set[Any] = set()
        for number in range(count):
            for item in self._items(number):
                # Of others, what the function does not take is said where it is wanted.
                with suppress(DataError) if number not in evenly_spaced else nullcontext():
                    shapes = self._shapes(item)
                    if number in evenly_spaced or (len(forms) == 1 and shapes not in forms):
                        self._looked_at.append(item)
                    forms.add(shapes)
                    for place, shape in enumerate(shapes):
                        for axis, size in enumerate(shape):
                            if (place, axis) not in most or size > most[place, axis][0]:
                                most[place, axis] = size, item
        return list({id(item): item for _, item in most.values()}.values()), forms

    def _check_lengths(self) -> None:
        """Refuse samples whose lengths are drawn at random: the longest of them is not known before training."""
        for number in self.numbers_that_draw:
            keys: list[DrawKey] = [FIXED, (*FIXED, "again"), (*FIXED, "and again")]
            found = [self._shapes(item) for key in keys for item in self._items(number, key)]
            if len(set(found)) > 1:
                raise DataError(
                    f"{self._where}: sample {number} has another length whenever it is read ({found[0]}, {found[-1]}), so that it is not known "
                    "to what samples are to be padded; have collate_fn pad all to one length, or draw no lengths at random"
                )

    def _check(self) -> None:
        """Refuse a function that does more than to pad samples: each is collated by itself here."""
        if not self._looked_at:
            return  # that there are none, or that none can be read, is said where they are wanted
        first, *rest = self._looked_at
        # Where samples differ in length, two that do: what the one does to the other would show.
        unlike = [item for item in rest if self._shapes(item) != self._shapes(first)]
        pair = [first, *(unlike or rest)[:1]]
        whole = self._batch([*pair, *self._beside])
        together = [pytree.tree_map(lambda tensor, row=row: tensor[row], whole) for row in range(len(pair))]
        same = _all_alike(same_values, together, [self._sample(item) for item in pair])
        if self.pads and same:
            same = _all_alike(
                _extends, [self._sample(item) for item in self._looked_at], [self._first([item]) for item in self._looked_at]
            )
        if not same:
            raise DataError(
                f"{self._where}: collate_fn gives other values for two samples together than for each alone, beside padding; keep mixing, and "
                "draws at random, out of it, since each sample is collated by itself here"
            )

    @property
    def _beside(self) -> list[Any]:
        return self.longest if self.pads else []

    def _sample(self, item: Any) -> Any:
        return self._first([item, *self._beside])

    def _first(self, items: Sequence[Any]) -> Any:
        return pytree.tree_map(lambda tensor: tensor[0], self._batch(items))

    def _batch(self, items: Sequence[Any]) -> Any:
        """Return a batch of items, every leaf of which is a tensor (B, ...)."""
        try:
            # Some functions change the items that they are given.
            batch = self._collate([dict(item) if isinstance(item, dict) else item for item in items])
        except (LowMemError, MemoryError):
            raise
        # Whatever a user's function raises is the user's to see, on one line, with the original as the cause.
        except Exception as error:
            raise DataError(f"{self._where}: collate_fn fails: {one_line(error)}; see to the function") from error
        # What the collators of transformers give is a mapping, and no dictionary.
        batch = pytree.tree_map(lambda leaf: dict(leaf) if isinstance(leaf, Mapping) else leaf, batch)
        leaves = pytree.tree_leaves(batch)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(items) for leaf in leaves):
            found = ", ".join(str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves[:4])
            raise DataError(
                f"{self._where}: collate_fn makes {found or 'nothing'} of {len(items)} samples; have it return tensors (samples, ...)"
            )
        return batch


def pad_alike(parts: Sequence[Any]) -> tuple[str, ...]:
    """Have the parts of some data padded to the longest sample of all, where any of them is padded.

    Args:
        parts: Parts of the data; others than collated ones stay as they are.

    Returns:
        What is said of it.
    """
    collated = [part for part in parts if isinstance(part, CollatedDataset)]
    if not any(part.pads for part in collated):
        return ()
    longest = [item for part in collated for item in part.longest]
    for part in collated:
        part.pad_to(longest)
    return (collated[0].padding_note,)


def _all_alike(alike: Callable[[Tensor, Tensor], bool], some: list[Any], others: list[Any]) -> bool:
    leaves, same = pytree.tree_leaves(some), pytree.tree_leaves(others)
    return len(leaves) == len(same) and all(map(alike, leaves, same))


def _begins_with(padded: Tensor, alone: Tensor) -> bool:
    return same_values(padded[tuple(map(slice, alone.shape))], alone)


def _extends(padded: Tensor, alone: Tensor) -> bool:
    """Decide whether a sample stands unchanged at one end of what it was padded to, along every axis."""
    if padded.ndim != alone.ndim or any(map(operator.lt, padded.shape, alone.shape)):
        return False
    ends = [{0, whole - size} for whole, size in zip(padded.shape, alone.shape, strict=True)]
    return any(
        same_values(padded[tuple(slice(begin, begin + size) for begin, size in zip(begins, alone.shape, strict=True))], alone)
        for begins in itertools.product(*ends)
    )

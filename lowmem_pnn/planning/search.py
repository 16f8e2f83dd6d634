"""The interval dynamic program: where to cut a chain, so that every range of layers between two cuts fits.

    best[s] = min over the ranges [s, t) that fit of (1 + partitions, traffic(t) + traffic, max(state of the range, largest state)) of
    best[t]

compared in this order. It is computed from the last layer to the first; the peak of a range is extended by a layer in constant time
(`RangePeaks.ranges`), so that a chain of L layers takes L * L / 2 steps per micro-batch, and as many again for each partition where
the number of partitions is given.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

from lowmem_pnn.profiling.costs import Affine, MemoryProfile
from lowmem_pnn.profiling.peaks import RangePeaks, largest_micro_batch, peak_of

GOOD_MICRO_BATCH = 32
"""Smallest micro-batch that keeps a device busy; a larger one gains little."""

# Number of partitions, traffic in bytes per sample, and largest state, of one way to cut the rest of a chain.
_Score = tuple[int, int, int]
_Value = TypeVar("_Value")


class Search:
    """Search for the best cuts of one chain under valid constraints.

    `room` is a budget without its overhead, and `peak` what a partition takes of it, without what is beside it.

    Args:
        profile: Memory costs of the layers.
        batches: Samples of an optimizer step, one number or one per partition.
        cuts: Layers that start a partition, without 0; None where the cuts are searched for.
        num_partitions: Number of partitions; None for as few as possible. Follows from the cuts where these are given.
        max_micro_batch: Most samples at once; None for no limit.
        objectives: For each layer, bytes of the objective of a partition that ends with the layer.
        beside: For each layer, bytes beside a partition that begins with the layer; its samples, and what is streamed.
        whole_batch: True for the whole batch at once in all partitions, False for several micro-batches in all of them, None for the
            cheaper choice in each.
    """

    def __init__(
        self,
        profile: MemoryProfile,
        batches: Sequence[int],
        cuts: Sequence[int] | None,
        num_partitions: int | None,
        max_micro_batch: int | None,
        objectives: Sequence[Affine],
        beside: Sequence[int],
        whole_batch: bool | None = None,
    ) -> None:
        self._layers = profile.layers
        self._smallest = profile.smallest_micro_batch
        self._end = len(profile.layers)
        self._starts = possible_starts(profile)
        self._bounds = None if cuts is None else [0, *cuts, self._end]
        self._num_partitions = num_partitions if cuts is None else len(cuts) + 1
        self._batches = tuple(batches)
        self._max_micro_batch = max_micro_batch
        self._objectives = objectives
        self._beside = beside
        self._whole_batch = whole_batch
        self._states = [0, *accumulate(layer.state_bytes for layer in profile.layers)]
        self._range_peaks: dict[tuple[int, int], list[RangePeaks]] = {}

    def best(self, room: int, good_micro_batch: int = GOOD_MICRO_BATCH) -> tuple[int, list[int] | None]:
        """Find the best cuts at the highest least micro-batch at which there are any.

        Args:
            room: Most bytes of a partition and what is beside it.
            good_micro_batch: Highest least micro-batch to try, a power of two.

        Returns:
            The least micro-batch, and `best_bounds` at it.
        """
        for least_micro_batch in self.least_micro_batches(good_micro_batch):
            bounds = self.best_bounds(least_micro_batch, room)
            if bounds is not None:
                break
        return least_micro_batch, bounds

    def least_micro_batches(self, good_micro_batch: int = GOOD_MICRO_BATCH) -> list[int]:
        """Return the least micro-batches to try, best first, without those that are equivalent for these batches."""
        halves = [good_micro_batch >> shift for shift in range(good_micro_batch.bit_length())]
        most = max(self._largest_allowed(batch) for batch in self._batches)
        # One that is at or above every batch is enough.
        return [*(size for size in halves if self._smallest < size < 2 * most), self._smallest]

    def best_bounds(self, least_micro_batch: int, room: int) -> list[int] | None:
        """Return where the best partitions begin and end, 0 and the end of the chain included; None if nothing fits.

        Args:
            least_micro_batch: Fewest samples at once in any partition.
            room: Most bytes of a partition and what is beside it.
        """
        if self._bounds is not None:
            return self._bounds if max(self.cheapest_peaks(self._bounds, least_micro_batch)) <= room else None
        fits = {batch: self._fitting_stops(batch, least_micro_batch, room) for batch in set(self._batches)}
        # The first pass finds the smallest largest state; the second may then choose freely among the partitions below it.
        best = self._tables(fits, None)[0].get(0)
        if best is None:
            return None
        tables = self._tables(fits, best[2])
        bounds = [0]
        while (start := bounds[-1]) < self._end:
            number = len(bounds) - 1
            after = tables[min(number + 1, len(tables) - 1)]
            wanted = tables[min(number, len(tables) - 1)][start][:2]
            bounds.append(
                next(
                    stop
                    for stop in fits[self._batch(number)][start]
                    if stop in after
                    and self._state(start, stop) <= best[2]
                    and (after[stop][0] + 1, after[stop][1] + self._traffic(stop)) == wanted
                )
            )
        return bounds

    def choose_micro_batch(self, number: int, start: int, stop: int, least_micro_batch: int, room: int) -> tuple[int, int]:
        """Return the largest micro-batch with which a partition fits, and its peak then.

        Args:
            number: Number of the partition.
            start: First layer of the partition.
            stop: Layer after the last.
            least_micro_batch: Micro-batch with which the partition is known to fit.
            room: Most bytes of the partition and what is beside it.
        """
        batch, layers, objective = self._batch(number), self._layers[start:stop], self._objectives[stop - 1]
        room -= self._beside[start]
        most = self._largest_allowed(batch)
        chosen = most
        if self._whole_batch is not True and (
            self._whole_batch is False
            or largest_micro_batch(batch, most, self._smallest) < batch
            or peak_of(layers, batch, batch, objective) > room
        ):
            # Below the whole batch a peak never falls as samples are added.
            low = min(peaks.micro_batch for peaks in self._choices(batch, least_micro_batch))
            high = min(most + self._smallest - 1, batch - 1)
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if peak_of(layers, middle, batch, objective) <= room else (low, middle - 1)
            chosen = next(
                size for size in range(min(low, most), 0, -1) if largest_micro_batch(batch, size, self._smallest) <= low
            )
        peak = self.peak(number, start, stop, chosen)
        assert peak <= room, "the search chose a partition that fits"
        return chosen, peak

    def peak(self, number: int, start: int, stop: int, micro_batch: int) -> int:
        """Return the peak of a partition with a given micro-batch, in bytes.

        Args:
            number: Number of the partition.
            start: First layer of the partition.
            stop: Layer after the last.
            micro_batch: Samples at once, as asked.
        """
        batch = self._batch(number)
        largest = largest_micro_batch(batch, micro_batch, self._smallest)
        return peak_of(self._layers[start:stop], largest, batch, self._objectives[stop - 1])

    def cheapest_peaks(self, bounds: Sequence[int], least_micro_batch: int | None = None) -> list[int]:
        """Return the peak of each partition at its cheapest micro-batch, with what is beside it, in bytes.

        Args:
            bounds: Where the partitions begin and end.
            least_micro_batch: Fewest samples at once; None for the fewest that the modules accept.
        """
        least = self._smallest if least_micro_batch is None else least_micro_batch
        return [
            self._beside[start]
            + min(
                peak_of(self._layers[start:stop], peaks.micro_batch, self._batch(number), self._objectives[stop - 1])
                for peaks in self._choices(self._batch(number), least)
            )
            for number, (start, stop) in enumerate(pairwise(bounds))
        ]

    def smallest_room(self) -> int:
        """Return the least room in which the chain can be cut under the constraints, at the smallest micro-batches."""
        if self._bounds is not None:
            return max(self.cheapest_peaks(self._bounds))
        return self._least_room({self._end: 0}, self._starts, self._num_partitions)

    def smallest_room_between(self, start: int, stop: int) -> int:
        """Return the least room in which a range of layers can be cut into any number of partitions, with the first batch size."""
        return self._least_room({stop: 0}, [layer for layer in self._starts if start <= layer < stop], None)

    def _least_room(self, last: dict[int, int], starts: Sequence[int], num_partitions: int | None) -> int:
        """Return the least room for partitions that begin at some of `starts`; `last` is the table behind the last partition."""
        needs = {batch: {start: self._growing_needs(batch, start) for start in starts} for batch in set(self._batches)}
        tables = _empty_tables(last, num_partitions)
        for number in reversed(range(num_partitions or 1)):
            table, after = tables[number], tables[min(number + 1, len(tables) - 1)]
            for start in _backwards(starts, only_first=num_partitions is not None and number == 0):
                own = needs[self._batch(number)][start]
                rooms = [max(own[stop - start - 1], room) for stop, room in after.items() if stop > start]
                if rooms:
                    table[start] = min(rooms)
        return tables[0][starts[0]]

    def _tables(self, fits: Mapping[int, list[list[int]]], most_state: int | None) -> list[dict[int, _Score]]:
        """Return the best ways to cut the rest of the chain: tables[k][s] is the score of layers s and on, from partition k on.

        With any number of partitions there is one table, which refers to itself.

        Args:
            fits: For each batch and first layer, where a partition may end.
            most_state: Largest state of a partition, in bytes; None for no limit.
        """
        last: dict[int, _Score] = {self._end: (0, 0, 0)}
        num_partitions = self._num_partitions
        tables = _empty_tables(last, num_partitions)
        for number in reversed(range(num_partitions or 1)):
            table, after = tables[number], tables[min(number + 1, len(tables) - 1)]
            for start in _backwards(self._starts, only_first=num_partitions is not None and number == 0):
                scores = [
                    (after[stop][0] + 1, after[stop][1] + self._traffic(stop), max(after[stop][2], self._state(start, stop)))
                    for stop in fits[self._batch(number)][start]
                    if stop in after and (most_state is None or self._state(start, stop) <= most_state)
                ]
                if scores:
                    table[start] = min(scores)
        return tables

    def _fitting_stops(self, batch: int, least_micro_batch: int, room: int) -> list[list[int]]:
        """Return for each layer where the partitions that begin with it and fit may end, ascending."""
        allowed = {*self._starts[1:], self._end}
        fits: list[list[int]] = [[] for _ in self._layers]
        for start in self._starts:
            own_room, stops = room - self._beside[start], set()
            for peaks in self._choices(batch, least_micro_batch):
                for stop, of_range in enumerate(peaks.ranges(start), start + 1):
                    if of_range[0] > own_room:
                        break  # the peak never falls as the range grows
                    if stop in allowed and peaks.with_objective(of_range, self._objectives[stop - 1]) <= own_room:
                        stops.add(stop)
            fits[start] = sorted(stops)
        return fits

    def _growing_needs(self, batch: int, start: int) -> list[int]:
        """Return what the partitions [start, start + 1), [start, start + 2), ... need at the smallest micro-batch, with what is beside."""
        of_choices = [
            [
                peaks.with_objective(of_range, objective)
                for of_range, objective in zip(peaks.ranges(start), self._objectives[start:], strict=True)
            ]
            for peaks in self._choices(batch, self._smallest)
        ]
        return [self._beside[start] + min(needs) for needs in zip(*of_choices, strict=True)]

    def _choices(self, batch: int, least_micro_batch: int) -> list[RangePeaks]:
        """Return the peaks at the micro-batches that may be the cheapest of those from `least_micro_batch` on.

        The cheapest is the smallest one; or the whole batch, which takes more for activations, but has no gradients in memory during
        its forward.
        """
        if (batch, least_micro_batch) not in self._range_peaks:
            most = self._largest_allowed(batch)
            least = max(self._smallest, min(least_micro_batch, most))
            if self._whole_batch is True:
                sizes = {batch}
            elif self._whole_batch is False:
                sizes = {
                    next(
                        largest
                        for size in range(least, 0, -1)
                        if (largest := largest_micro_batch(batch, size, self._smallest)) < batch
                    )
                }
            else:
                asked = range(least, min(least + self._smallest - 1, most) + 1)
                sizes = {
                    min(largest_micro_batch(batch, size, self._smallest) for size in asked),
                    largest_micro_batch(batch, most, self._smallest),
                }
            self._range_peaks[batch, least_micro_batch] = [RangePeaks(self._layers, size, size < batch) for size in sorted(sizes)]
        return self._range_peaks[batch, least_micro_batch]

    def _largest_allowed(self, batch: int) -> int:
        return min(batch, self._max_micro_batch or batch)

    def _state(self, start: int, stop: int) -> int:
        return self._states[stop] - self._states[start]

    def _traffic(self, cut: int) -> int:
        """Return the bytes per sample that are written and read again at a cut; 0 at the end of the chain."""
        return self._layers[cut].input_bytes.per_sample if cut < self._end else 0

    def _batch(self, number: int) -> int:
        return self._batches[0] if len(self._batches) == 1 else self._batches[number]


class UniformSearch:
    """Search for partitions that all have the same micro-batch: the whole batch, or one with which gradients add up everywhere.

    One partition may fit with the whole batch alone, since no gradients are in memory during its forward then, and another one only with
    less: so there are two searches. The methods are those of `Search`.

    Args:
        searches: Searches with `whole_batch` True, and False; at least one of them.
    """

    def __init__(self, searches: Sequence[Search]) -> None:
        self._searches = searches
        self._chosen = searches[0]

    def best(self, room: int, good_micro_batch: int = GOOD_MICRO_BATCH) -> tuple[int, list[int] | None]:
        """Find the cuts with the higher least micro-batch; of two such those with fewer partitions, or the whole batch."""
        candidates: list[tuple[int, int, int, int, list[int], Search]] = []
        for search in self._searches:
            least, bounds = search.best(room, good_micro_batch)
            if bounds is not None:
                candidates.append((-min(least, good_micro_batch), len(bounds), len(candidates), least, bounds, search))
        if not candidates:
            return least, None
        *_, least, bounds, self._chosen = min(candidates, key=lambda candidate: candidate[:3])
        return least, bounds

    def choose_micro_batch(self, number: int, start: int, stop: int, least_micro_batch: int, room: int) -> tuple[int, int]:
        """Return the largest micro-batch, and the peak, in the search that `best` chose."""
        return self._chosen.choose_micro_batch(number, start, stop, least_micro_batch, room)

    def peak(self, number: int, start: int, stop: int, micro_batch: int) -> int:
        """Return the peak of a partition with a given micro-batch, in bytes."""
        return self._chosen.peak(number, start, stop, micro_batch)

    def cheapest_peaks(self, bounds: Sequence[int], least_micro_batch: int | None = None) -> list[int]:
        """Return the peaks of the partitions, with what is beside them, in the search in which the largest is smallest, in bytes."""
        return min((search.cheapest_peaks(bounds, least_micro_batch) for search in self._searches), key=max)

    def smallest_room(self) -> int:
        """Return the least room in which the chain can be cut under the constraints."""
        return min(search.smallest_room() for search in self._searches)

    def smallest_room_between(self, start: int, stop: int) -> int:
        """Return the least room in which a range of layers can be cut."""
        return min(search.smallest_room_between(start, stop) for search in self._searches)


def possible_starts(profile: MemoryProfile) -> list[int]:
    """Return the layers that may start a partition, the first layer included."""
    return [layer for layer in range(len(profile.layers)) if layer == 0 or layer not in profile.forbidden_cuts]


def _empty_tables(last: dict[int, _Value], num_partitions: int | None) -> list[dict[int, _Value]]:
    """Return one table per partition and the one behind the last; with any number of partitions a single one for all."""
    return [last] if num_partitions is None else [*({} for _ in range(num_partitions)), last]


def _backwards(starts: Sequence[int], only_first: bool) -> Iterable[int]:
    return starts[:1] if only_first else reversed(starts)

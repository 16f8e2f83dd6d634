"""The interval dynamic program: where to cut a chain, so that every run of layers between two cuts fits.

    best[s] = min over the runs [s, t) that fit of (1 + partitions, traffic(t) + traffic, max(state of the run, largest state)) of
    best[t]

compared in this order. Taken from the last layer to the first; a run's peak is extended by a layer in constant time
(`RangePeaks.runs`), so a chain of L layers takes L * L / 2 steps a micro-batch, and as many again for each partition where their
number is given.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

from lowmem_pnn.profiling.costs import Affine, MemoryProfile
from lowmem_pnn.profiling.peaks import RangePeaks, largest_micro_batch, peak_of

GOOD_MICRO_BATCH = 32
"""A smaller micro-batch leaves a device idle; a larger one gains little."""

# Partitions, traffic in bytes per sample, and largest state of a way to cut what is left of a chain.
_Way = tuple[int, int, int]


class Search:
    """The search for one chain and one set of wishes, which are valid. `room` is a budget without its overhead.

    Args:
        profile: what the layers cost.
        batches: samples a step, one number or one for each partition.
        cuts: layers that start a partition, without 0, or None where they are to be found.
        num_partitions: how many, or None for as few as possible; follows from the cuts where they are given.
        cap: most samples at once, or None.
        objectives: for each layer, what the objective of a partition that ends with it needs.
        whole: True for the whole batch at once everywhere, False for several micro-batches everywhere, None for what is cheaper.
    """

    def __init__(
        self,
        profile: MemoryProfile,
        batches: Sequence[int],
        cuts: Sequence[int] | None,
        num_partitions: int | None,
        cap: int | None,
        objectives: Sequence[Affine],
        whole: bool | None = None,
    ) -> None:
        self._layers = profile.layers
        self._smallest = profile.smallest_micro_batch
        self._end = len(profile.layers)
        self._starts = possible_starts(profile)
        self._bounds = None if cuts is None else [0, *cuts, self._end]
        self._num_partitions = num_partitions if cuts is None else len(cuts) + 1
        self._batches = tuple(batches)
        self._cap = cap
        self._objectives = objectives
        self._whole = whole
        self._states = [0, *accumulate(layer.state_bytes for layer in profile.layers)]
        self._priced: dict[tuple[int, int], list[RangePeaks]] = {}

    def best(self, room: int, good_micro_batch: int = GOOD_MICRO_BATCH) -> tuple[int, list[int] | None]:
        """The best plan with the highest least micro-batch at which there is one.

        Args:
            room: most bytes of a partition.
            good_micro_batch: the highest to try, a power of two.

        Returns:
            The least micro-batch, and `best_bounds` there.
        """
        for floor in self.floors(good_micro_batch):
            bounds = self.best_bounds(floor, room)
            if bounds is not None:
                break
        return floor, bounds

    def floors(self, good_micro_batch: int = GOOD_MICRO_BATCH) -> list[int]:
        """Least micro-batches to try, best first; those that come to the same for these batches once."""
        halves = [good_micro_batch >> shift for shift in range(good_micro_batch.bit_length())]
        most = max(min(batch, self._cap or batch) for batch in self._batches)
        # Of the floors at or above every batch, one is enough.
        return [*(floor for floor in halves if self._smallest < floor < 2 * most), self._smallest]

    def best_bounds(self, floor: int, room: int) -> list[int] | None:
        """Where the best plan's partitions begin and end, 0 and the chain's end included; None if nothing fits.

        Args:
            floor: least micro-batch.
            room: most bytes of a partition.
        """
        if self._bounds is not None:
            return self._bounds if max(self.needs(self._bounds, floor)) <= room else None
        fits = {batch: self._fitting_stops(batch, floor, room) for batch in set(self._batches)}
        # The first pass finds the smallest largest state; the second may then choose freely among what stays below it.
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

    def largest_micro_batch(self, number: int, start: int, stop: int, floor: int, room: int) -> tuple[int, int]:
        """The largest micro-batch with which a partition that fits at `floor` fits, and its peak then.

        Args:
            number: the partition's.
            start: its first layer.
            stop: the layer after its last.
            floor: least micro-batch.
            room: most bytes.
        """
        batch, layers, objective = self._batch(number), self._layers[start:stop], self._objectives[stop - 1]
        most = min(batch, self._cap or batch)
        chosen = most
        if self._whole is not True and (
            self._whole is False
            or largest_micro_batch(batch, most, self._smallest) < batch
            or peak_of(layers, batch, batch, objective) > room
        ):
            # Below the whole batch a peak never falls as samples are added.
            low = min(prices.micro_batch for prices in self._choices(batch, floor))
            high = min(most + self._smallest - 1, batch - 1)
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if peak_of(layers, middle, batch, objective) <= room else (low, middle - 1)
            chosen = next(
                size for size in range(min(low, most), 0, -1) if largest_micro_batch(batch, size, self._smallest) <= low
            )
        peak = peak_of(layers, largest_micro_batch(batch, chosen, self._smallest), batch, objective)
        assert peak <= room, "the search chose a partition that fits"
        return chosen, peak

    def peak(self, number: int, start: int, stop: int, micro_batch: int) -> int:
        """A partition's peak with a given micro-batch.

        Args:
            number: the partition's.
            start: its first layer.
            stop: the layer after its last.
            micro_batch: samples at once, as asked.
        """
        batch = self._batch(number)
        part = largest_micro_batch(batch, micro_batch, self._smallest)
        return peak_of(self._layers[start:stop], part, batch, self._objectives[stop - 1])

    def needs(self, bounds: Sequence[int], floor: int | None = None) -> list[int]:
        """What partitions with given bounds need.

        Args:
            bounds: where they begin and end.
            floor: least micro-batch; None for the smallest.

        Returns:
            For each, its peak at the cheapest micro-batch.
        """
        floor = self._smallest if floor is None else floor
        return [
            min(
                peak_of(self._layers[start:stop], prices.micro_batch, self._batch(number), self._objectives[stop - 1])
                for prices in self._choices(self._batch(number), floor)
            )
            for number, (start, stop) in enumerate(pairwise(bounds))
        ]

    def smallest_room(self) -> int:
        """The least room in which the chain can be partitioned as wished, at the smallest micro-batches."""
        if self._bounds is not None:
            return max(self.needs(self._bounds))
        rounds = self._num_partitions
        return self._least_rooms({self._end: 0}, self._starts, rounds)

    def smallest_room_between(self, start: int, stop: int) -> int:
        """The least room in which a stretch of layers can be partitioned, into any number, with the first batch size."""
        return self._least_rooms({stop: 0}, [layer for layer in self._starts if start <= layer < stop], None)

    def _least_rooms(self, last: dict[int, int], starts: Sequence[int], rounds: int | None) -> int:
        needs = {batch: {start: self._growing_needs(batch, start) for start in starts} for batch in set(self._batches)}
        tables: list[dict[int, int]] = [last] if rounds is None else [*({} for _ in range(rounds)), last]
        for number in reversed(range(rounds or 1)):
            table, after = tables[number], tables[min(number + 1, len(tables) - 1)]
            for start in _backwards(starts, only_first=rounds is not None and number == 0):
                costs = needs[self._batch(number)][start]
                rooms = [max(costs[stop - start - 1], room) for stop, room in after.items() if stop > start]
                if rooms:
                    table[start] = min(rooms)
        return tables[0][starts[0]]

    def _tables(self, fits: Mapping[int, list[list[int]]], most_state: int | None) -> list[dict[int, _Way]]:
        """Best ways to cut what is left: tables[k][s] is that of layers s and on, from partition k on.

        With any number of partitions there is one table, which refers to itself.

        Args:
            fits: for each batch and first layer, where a partition may end.
            most_state: partitions with a larger state are left out; None for none.
        """
        last: dict[int, _Way] = {self._end: (0, 0, 0)}
        rounds = self._num_partitions
        tables: list[dict[int, _Way]] = [last] if rounds is None else [*({} for _ in range(rounds)), last]
        for number in reversed(range(rounds or 1)):
            table, after = tables[number], tables[min(number + 1, len(tables) - 1)]
            for start in _backwards(self._starts, only_first=rounds is not None and number == 0):
                ways = [
                    (after[stop][0] + 1, after[stop][1] + self._traffic(stop), max(after[stop][2], self._state(start, stop)))
                    for stop in fits[self._batch(number)][start]
                    if stop in after and (most_state is None or self._state(start, stop) <= most_state)
                ]
                if ways:
                    table[start] = min(ways)
        return tables

    def _fitting_stops(self, batch: int, floor: int, room: int) -> list[list[int]]:
        """For each layer, where the partitions that begin with it and fit may end, ascending."""
        allowed = {*self._starts[1:], self._end}
        fits: list[list[int]] = [[] for _ in self._layers]
        for start in self._starts:
            found = set()
            for prices in self._choices(batch, floor):
                for stop, run in enumerate(prices.ranges(start), start + 1):
                    if run[0] > room:
                        break  # it never falls as the run grows
                    if stop in allowed and prices.with_objective(run, self._objectives[stop - 1]) <= room:
                        found.add(stop)
            fits[start] = sorted(found)
        return fits

    def _growing_needs(self, batch: int, start: int) -> list[int]:
        """What the partitions [start, start + 1), [start, start + 2), ... need at the smallest micro-batch."""
        priced = [
            [
                prices.with_objective(run, objective)
                for run, objective in zip(prices.ranges(start), self._objectives[start:], strict=True)
            ]
            for prices in self._choices(batch, self._smallest)
        ]
        return [min(needs) for needs in zip(*priced, strict=True)]

    def _choices(self, batch: int, floor: int) -> list[RangePeaks]:
        """The micro-batches among which the cheapest that is not below `floor` is.

        That is the smallest; or the whole batch, which takes more for activations, but no gradients are there during its forward.
        """
        if (batch, floor) not in self._priced:
            most = min(batch, self._cap or batch)
            least = max(self._smallest, min(floor, most))
            sizes = range(least, min(least + self._smallest - 1, most) + 1)
            parts = {
                min(largest_micro_batch(batch, size, self._smallest) for size in sizes),
                largest_micro_batch(batch, most, self._smallest),
            }
            if self._whole is True:
                parts = {batch}
            elif self._whole is False:
                parts = {
                    next(
                        part for size in range(least, 0, -1) if (part := largest_micro_batch(batch, size, self._smallest)) < batch
                    )
                }
            self._priced[batch, floor] = [RangePeaks(self._layers, part, part < batch) for part in sorted(parts)]
        return self._priced[batch, floor]

    def _state(self, start: int, stop: int) -> int:
        return self._states[stop] - self._states[start]

    def _traffic(self, cut: int) -> int:
        """Bytes per sample that are written and read again at a cut; nothing at the chain's end."""
        return self._layers[cut].input_bytes.per_sample if cut < self._end else 0

    def _batch(self, number: int) -> int:
        return self._batches[0] if len(self._batches) == 1 else self._batches[number]


class UniformSearch:
    """A search for partitions that all have the same micro-batch: the whole batch, or one with which gradients add up everywhere.

    A partition may fit with the whole batch alone, since no gradients are there during its forward then, and another one only with
    less: so these are two searches. The methods are those of `Search`.

    Args:
        searches: with `whole` True, and False; at least one of them.
    """

    def __init__(self, searches: Sequence[Search]) -> None:
        self._searches = searches
        self._chosen = searches[0]

    def best(self, room: int, good_micro_batch: int = GOOD_MICRO_BATCH) -> tuple[int, list[int] | None]:
        """The one with the higher least micro-batch; of two such the one with fewer partitions, or the whole batch."""
        found: list[tuple[int, int, int, int, list[int], Search]] = []
        for search in self._searches:
            floor, bounds = search.best(room, good_micro_batch)
            if bounds is not None:
                found.append((-min(floor, good_micro_batch), len(bounds), len(found), floor, bounds, search))
        if not found:
            return floor, None
        *_, floor, bounds, self._chosen = min(found, key=lambda item: item[:3])
        return floor, bounds

    def largest_micro_batch(self, number: int, start: int, stop: int, floor: int, room: int) -> tuple[int, int]:
        """Of the search that `best` chose."""
        return self._chosen.largest_micro_batch(number, start, stop, floor, room)

    def peak(self, number: int, start: int, stop: int, micro_batch: int) -> int:
        """A partition's peak with a given micro-batch."""
        return self._chosen.peak(number, start, stop, micro_batch)

    def needs(self, bounds: Sequence[int], floor: int | None = None) -> list[int]:
        """What partitions need in the way in which the largest needs least."""
        return min((search.needs(bounds, floor) for search in self._searches), key=max)

    def smallest_room(self) -> int:
        """The least room in which the chain can be partitioned as wished."""
        return min(search.smallest_room() for search in self._searches)

    def smallest_room_between(self, start: int, stop: int) -> int:
        """The least room in which a stretch of layers can be partitioned."""
        return min(search.smallest_room_between(start, stop) for search in self._searches)


def possible_starts(profile: MemoryProfile) -> list[int]:
    """The layers that may start a partition; the first is one of them."""
    return [layer for layer in range(len(profile.layers)) if layer == 0 or layer not in profile.forbidden_cuts]


def _backwards(starts: Sequence[int], only_first: bool) -> Iterable[int]:
    return starts[:1] if only_first else reversed(starts)

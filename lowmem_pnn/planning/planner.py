"""The planner: which layers make a partition, and how many samples go through it at once, so that everything fits the budget.

It wants, in this order:

1. a micro-batch of at least min(batch, 32) everywhere; else of 16, 8, ..., down to what the modules accept;
2. the fewest partitions (or as many as asked for);
3. the least traffic through the boundaries, in bytes per sample;
4. the smallest largest training state;
5. the earliest cuts.

Then each partition gets the largest micro-batch that fits. The search is in `lowmem_pnn.planning.search`; here is what is asked of
it, what comes out, and the words where nothing does. Integers in, integers out: no torch, no device.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.partition_plan import PartitionPlan, Plan
from lowmem_pnn.planning.search import GOOD_MICRO_BATCH, Search, UniformSearch, possible_starts
from lowmem_pnn.profiling.costs import Affine, MemoryProfile
from lowmem_pnn.profiling.peaks import default_objective, largest_micro_batch, peak_of
from lowmem_pnn.units import format_bytes

# The objective of a partition, from the number of the layer after its last.
Objectives = Callable[[int], Affine]
# Bytes that are needed beside a partition: a number, or a function of the budget.
Overhead = int | Callable[[int], int]


def partition_peak(
    profile: MemoryProfile,
    start: int,
    stop: int,
    micro_batch: int,
    batch: int,
    loss: Affine | None = None,
    overhead_bytes: int = 0,
) -> int:
    """The most that a partition holds while it trains (the table in `lowmem_pnn.profiling.costs`).

    Args:
        profile: what the layers cost.
        start: its first layer.
        stop: the layer after its last.
        micro_batch: samples on the device at once.
        batch: samples a step.
        loss: what its objective needs: `fixed` all the time, `per_sample` between forward and backward; None for three times its
            outputs (targets, differences, gradient).
        overhead_bytes: added.

    Returns:
        Bytes.
    """
    objective = default_objective(profile.layers[stop - 1]) if loss is None else loss
    part = largest_micro_batch(batch, micro_batch, profile.smallest_micro_batch)
    return peak_of(profile.layers[start:stop], part, batch, objective) + overhead_bytes


def plan(
    profile: MemoryProfile,
    *,
    budget_bytes: int,
    overhead_bytes: Overhead = 0,
    batch_sizes: int | Sequence[int],
    cuts: Sequence[int] | None = None,
    num_partitions: int | None = None,
    micro_batch: int | None = None,
    objective: Objectives | None = None,
    good_micro_batch: int = GOOD_MICRO_BATCH,
    uniform: bool = False,
) -> Plan:
    """Cut a chain into partitions that fit a budget.

    Args:
        profile: what the layers cost.
        budget_bytes: what a partition and the overhead may hold together.
        overhead_bytes: what is needed beside every partition; or a function that gives it for a budget, which must grow by less
            than the budget does, so that the smallest budget that an error suggests is right.
        batch_sizes: samples a step: one number for all partitions, or one for each (then give `cuts` or `num_partitions`).
        cuts: layers that start a partition, ascending, without 0: the partitions are given, and only micro-batches are chosen.
        num_partitions: exactly so many; None for as few as possible.
        micro_batch: the most samples at once; None for as many as fit.
        objective: what the loss of a partition that ends before layer `stop` needs, as `partition_peak` takes it.
        good_micro_batch: a power of two: larger micro-batches are no reason for more partitions.
        uniform: one micro-batch for all partitions: the least of theirs.

    Returns:
        The best plan in the order of the module's docstring.

    Raises:
        ConfigError: cuts, a number of partitions or of samples that the chain cannot have.
        BudgetError: nothing fits; the message says what does not, and the smallest budget that would do.
    """
    wishes = _Wishes(profile, batch_sizes, cuts, num_partitions, micro_batch, objective, uniform)
    search = wishes.search()
    overhead = _overhead(overhead_bytes, budget_bytes)
    room = budget_bytes - overhead
    floor, bounds = search.best(room, good_micro_batch)
    if bounds is None:
        enough = _with_overhead(wishes.search().smallest_room(), overhead_bytes)
        raise BudgetError(_explain(wishes, budget_bytes, overhead_bytes), enough)
    partitions = []
    chosen = [
        search.largest_micro_batch(number, start, stop, floor, room) for number, (start, stop) in enumerate(pairwise(bounds))
    ]
    if uniform:
        least = min(size for size, _ in chosen)
        chosen = [(least, search.peak(number, *span, least)) for number, span in enumerate(pairwise(bounds))]
    for number, (start, stop) in enumerate(pairwise(bounds)):
        size, peak = chosen[number]
        layers = profile.layers[start:stop]
        partitions.append(
            PartitionPlan(
                start=start,
                stop=stop,
                micro_batch=size,
                batch=wishes.batches[0] if len(wishes.batches) == 1 else wishes.batches[number],
                predicted_peak_bytes=peak + overhead,
                state_bytes=sum(layer.state_bytes for layer in layers),
                num_params=sum(layer.num_params for layer in layers),
                input_bytes_per_sample=layers[0].input_bytes.per_sample,
                output_bytes_per_sample=layers[-1].output_bytes.per_sample,
                forward_macs=sum(layer.forward_macs for layer in layers),
            )
        )
    return Plan(
        partitions=tuple(partitions),
        budget_bytes=budget_bytes,
        overhead_bytes=overhead,
        predicted_peak_bytes=max(partition.predicted_peak_bytes for partition in partitions),
        smallest_micro_batch=profile.smallest_micro_batch,
    )


def smallest_budget(
    profile: MemoryProfile,
    *,
    overhead_bytes: Overhead = 0,
    batch_sizes: int | Sequence[int],
    cuts: Sequence[int] | None = None,
    num_partitions: int | None = None,
    micro_batch: int | None = None,
    objective: Objectives | None = None,
) -> int:
    """The smallest budget that `plan` can meet, with micro-batches as small as the modules accept.

    Args and errors are those of `plan`, but that there is no budget to miss.

    Returns:
        Bytes.
    """
    search = _Wishes(profile, batch_sizes, cuts, num_partitions, micro_batch, objective).search()
    return _with_overhead(search.smallest_room(), overhead_bytes)


class _Wishes:
    """What `plan` was asked for, checked against the chain.

    Raises:
        ConfigError: the chain cannot have it.
    """

    def __init__(
        self,
        profile: MemoryProfile,
        batch_sizes: int | Sequence[int],
        cuts: Sequence[int] | None,
        num_partitions: int | None,
        micro_batch: int | None,
        objective: Objectives | None,
        uniform: bool = False,
    ) -> None:
        if cuts is not None and num_partitions not in (None, len(cuts) + 1):
            raise ConfigError(
                f"--partitions {num_partitions} and {_count(len(cuts), 'cut')} in --cuts contradict each other; give one"
            )
        self.profile = profile
        self.batches = (batch_sizes,) if isinstance(batch_sizes, int) else tuple(batch_sizes)
        self.cuts = None if cuts is None else list(cuts)
        self.num_partitions = num_partitions if cuts is None else len(cuts) + 1
        self.micro_batch = micro_batch
        self.uniform = uniform
        self.objectives = [
            objective(stop) if objective else default_objective(layer) for stop, layer in enumerate(profile.layers, start=1)
        ]
        self._check_cuts()
        self._check_samples()

    def search(self, *, batch: int | None = None, freely: bool = False) -> Search | UniformSearch:
        """The search for what was asked.

        Args:
            batch: another batch size, for all partitions.
            freely: with any cuts and any number of partitions.
        """
        batches = self.batches if batch is None else (batch,)

        def search(whole: bool | None) -> Search:
            cuts, number = (None, None) if freely else (self.cuts, self.num_partitions)
            return Search(self.profile, batches, cuts, number, self.micro_batch, self.objectives, whole)

        if not self.uniform:
            return search(None)
        smallest, most = self.profile.smallest_micro_batch, min(self.micro_batch or max(batches), *batches)
        possible = [largest_micro_batch(size, most, smallest) == size for size in batches]
        ways = [True] if all(possible) else []
        if all(largest_micro_batch(size, smallest, smallest) < size for size in batches):
            ways.append(False)
        return UniformSearch([search(whole) for whole in ways])

    def title(self, start: int, stop: int) -> str:
        """Layers by name."""
        first, last = self.profile.layers[start].name, self.profile.layers[stop - 1].name
        return f"layer {first!r}" if stop == start + 1 else f"layers {first!r} to {last!r}"

    def _check_cuts(self) -> None:
        end, starts = len(self.profile.layers), possible_starts(self.profile)
        if self.cuts is not None:
            if any(not before < cut < end for before, cut in pairwise([0, *self.cuts])):
                possible = f"must be ascending and between 1 and {end - 1}" if end > 1 else "are none"
                raise ConfigError(
                    f"--cuts at layers {', '.join(map(str, self.cuts))}: the cuts of a model of {_count(end, 'layer')} {possible}"
                )
            for cut in self.cuts:
                if cut not in starts:
                    _, nearest = min([(abs(start - cut), start) for start in starts[1:]], default=(0, 0))
                    elsewhere = f"cut elsewhere, the nearest is {self.profile.layers[nearest].name!r}"
                    raise ConfigError(
                        f"--cuts: layer {cut} ({self.profile.layers[cut].name!r}) cannot start a partition, because a weight is "
                        f"shared across that cut; {elsewhere if nearest else 'this model can only be one partition'}"
                    )
        elif self.num_partitions is not None and not 1 <= self.num_partitions <= len(starts):
            raise ConfigError(
                f"--partitions {self.num_partitions}: this model of {_count(end, 'layer')} can be cut into at most "
                f"{_count(len(starts), 'partition')}; give a number from 1 to {len(starts)}"
            )

    def _check_samples(self) -> None:
        number, smallest = self.num_partitions, self.profile.smallest_micro_batch
        if len(self.batches) != 1 and len(self.batches) != number:
            known = "a number of partitions that is left open" if number is None else _count(number, "partition")
            raise ConfigError(
                f"--batch-size has {_count(len(self.batches), 'value')} for {known}; give one value, or as many "
                f"--partitions or --cuts"
            )
        for name, size in (("--batch-size", min(self.batches)), ("--micro-batch", self.micro_batch or smallest)):
            if size < smallest:
                raise ConfigError(
                    f"{name} {size}: in train mode the model takes at least {_count(smallest, 'sample')} at once (BatchNorm over "
                    f"single values needs them); give {name} {smallest} or more"
                )


def _explain(wishes: _Wishes, budget_bytes: int, overhead_bytes: Overhead) -> str:
    """Why nothing fits, and what would help, in one line."""
    search, overhead = wishes.search(), _overhead(overhead_bytes, budget_bytes)
    room = budget_bytes - overhead
    enough = _with_overhead(search.smallest_room(), overhead_bytes)
    remedies = [f"--max-gpu-mem {-(-enough // 1_000_000)}MB"]
    starts, end = possible_starts(wishes.profile), len(wishes.profile.layers)
    if wishes.cuts is not None:
        bounds = [0, *wishes.cuts, end]
        number, need = _largest(search.needs(bounds))
        start, stop = bounds[number], bounds[number + 1]
        whose = "the whole model as one partition" if len(bounds) == 2 else f"partition {number + 1} of {len(bounds) - 1}"
        subject = f"{whose} ({wishes.title(start, stop)}) needs"
        inside = [layer for layer in starts if start < layer < stop]
        if inside and search.smallest_room_between(start, stop) <= room:
            remedies.append("more --cuts in it")
    elif wishes.num_partitions is not None:
        need = search.smallest_room()
        number = wishes.num_partitions
        subject = "the whole model as one partition needs" if number == 1 else f"the largest of {number} partitions needs"
        free = wishes.search(freely=True)
        if len(wishes.batches) == 1 and free.smallest_room() <= room:
            _, fewest = free.best(room)
            assert fewest is not None, "there is room for some partitions"
            remedies.append(f"--partitions {len(fewest) - 1}")
    else:
        bounds = [*starts, end]
        number, need = _largest(search.needs(bounds))
        start, stop = bounds[number], bounds[number + 1]
        subject = f"{wishes.title(start, stop)} {'alone needs' if stop == start + 1 else 'share a weight and need'}"
    smaller = _helpful_batch(wishes, room)
    if smaller is not None:
        remedies.append(f"--batch-size {smaller}")
    # To the byte where rounding would make the two sizes look the same.
    found, bound = format_bytes(need + overhead), format_bytes(budget_bytes)
    if found == bound:
        found, bound = f"{need + overhead} B", f"{budget_bytes} B"
    return f"{subject} {found}, above the budget of {bound}; give {', or '.join(remedies)}"


def _helpful_batch(wishes: _Wishes, room: int) -> int | None:
    """The largest power of two below the batch size with which the room would do; None if there is none.

    A batch that goes through at once needs no gradients of the batch before during its forward.
    """
    if len(wishes.batches) > 1 or wishes.search(batch=wishes.profile.smallest_micro_batch).smallest_room() > room:
        return None
    size = 1 << (wishes.batches[0].bit_length() - 1)
    while size >= wishes.profile.smallest_micro_batch:
        if size < wishes.batches[0] and wishes.search(batch=size).smallest_room() <= room:
            return size
        size //= 2
    return None


def _overhead(overhead_bytes: Overhead, budget_bytes: int) -> int:
    return overhead_bytes(budget_bytes) if callable(overhead_bytes) else overhead_bytes


def _with_overhead(room: int, overhead_bytes: Overhead) -> int:
    """The smallest budget that leaves this much room."""
    # From below: the overhead grows by less than the budget does, so that this ends, at the first budget that does.
    budget = room
    while (wanted := room + _overhead(overhead_bytes, budget)) > budget:
        budget = wanted
    return budget


def _largest(needs: Sequence[int]) -> tuple[int, int]:
    """Where the largest is, and what it is."""
    return max(enumerate(needs), key=lambda item: item[1])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

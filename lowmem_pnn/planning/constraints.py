"""Constraints on a plan: cuts, number of partitions, batches and micro-batch, and what is beside them, checked against the chain."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import pairwise

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.planning.search import Search, UniformSearch, possible_starts
from lowmem_pnn.profiling.costs import Affine, MemoryProfile
from lowmem_pnn.profiling.peaks import default_objective, largest_micro_batch

Objectives = Callable[[int], Affine]
"""Function from the layer after a partition's last to the bytes of the partition's objective."""

Overhead = int | Callable[[int], int]
"""Bytes that are needed beside a partition: a number, or a function of the budget."""

Beside = Callable[[int], Sequence[int]]
"""Function from a budget to the bytes beside a partition, for each layer that it may begin with, or end with."""


@dataclass(frozen=True)
class Constraints:
    """What the partitions of one chain have to be, and what is needed beside them.

    Args:
        profile: Memory costs of the layers.
        batch_sizes: Samples of an optimizer step: one number for all partitions, or one for each (then give `cuts` or
            `num_partitions`).
        cuts: Layers that start a partition, ascending, without 0: the partitions are given, and only micro-batches are chosen.
        num_partitions: Exact number of partitions; None for as few as possible.
        micro_batch: Most samples at once; None for as many as fit.
        objective: Function from the layer after a partition's last to the bytes of its loss, as `planner.partition_peak` takes them.
        uniform: Whether all partitions have one micro-batch: the smallest of theirs.
        whole_batches: Whether a batch has to go through at once.
        overhead_bytes: Bytes that are needed beside every partition; or a function that gives them for a budget, which must grow by
            less than the budget does, so that the smallest budget that an error suggests is right.
        beside_bytes: Function from a budget to the bytes that are needed beside a partition, for each layer that it may begin with; they
            must grow by less than the budget does, together with the overhead.
        ending_bytes: Function from a budget to the bytes that are needed by a partition, for each layer that may be its last.

    Raises:
        ConfigError: The chain cannot have such cuts, or such numbers of partitions or samples.
    """

    profile: MemoryProfile
    _: KW_ONLY
    batch_sizes: int | Sequence[int]
    cuts: Sequence[int] | None = None
    num_partitions: int | None = None
    micro_batch: int | None = None
    objective: Objectives | None = None
    uniform: bool = False
    whole_batches: bool = False
    overhead_bytes: Overhead = 0
    beside_bytes: Beside | None = None
    ending_bytes: Beside | None = None

    def __post_init__(self) -> None:
        if self.cuts is not None and self.num_partitions not in (None, len(self.cuts) + 1):
            raise ConfigError(
                f"--partitions {self.num_partitions} and {count(len(self.cuts), 'cut')} in --cuts contradict each other; give one"
            )
        self._check_cuts()
        self._check_samples()

    @property
    def batches(self) -> tuple[int, ...]:
        """Samples of an optimizer step: one number, or one for each partition."""
        return (self.batch_sizes,) if isinstance(self.batch_sizes, int) else tuple(self.batch_sizes)

    @property
    def wanted_partitions(self) -> int | None:
        """Number of partitions, by itself or by the cuts; None where it is left open."""
        return self.num_partitions if self.cuts is None else len(self.cuts) + 1

    @cached_property
    def _objectives(self) -> list[Affine]:
        layers = enumerate(self.profile.layers, start=1)
        return [self.objective(stop) if self.objective is not None else default_objective(layer) for stop, layer in layers]

    def overhead(self, budget_bytes: int) -> int:
        """Return the bytes beside every partition under a budget.

        Args:
            budget_bytes: The budget.
        """
        return self.overhead_bytes(budget_bytes) if callable(self.overhead_bytes) else self.overhead_bytes

    def batch_of(self, number: int) -> int:
        """Return the batch of a partition, in samples."""
        return self.batches[0] if len(self.batches) == 1 else self.batches[number]

    def beside(self, budget_bytes: int) -> Sequence[int]:
        """Return the bytes beside a partition under a budget, for each layer that it may begin with.

        Args:
            budget_bytes: The budget.
        """
        return [0] * len(self.profile.layers) if self.beside_bytes is None else self.beside_bytes(budget_bytes)

    def objectives(self, budget_bytes: int) -> list[Affine]:
        """Return the bytes of a partition's objective, and what else its end takes, for each layer that may be its last.

        Args:
            budget_bytes: The budget.
        """
        ends = [0] * len(self._objectives) if self.ending_bytes is None else self.ending_bytes(budget_bytes)
        return [Affine(one.fixed + end, one.per_sample) for one, end in zip(self._objectives, ends, strict=True)]

    def search(self, budget_bytes: int, *, batch: int | None = None, any_cuts: bool = False) -> Search | UniformSearch:
        """Return the search under these constraints.

        Args:
            budget_bytes: The budget, from which follows what is beside a partition.
            batch: Another batch size, for all partitions.
            any_cuts: Whether to search over all cuts and numbers of partitions instead of the given ones.
        """
        batches, beside = self.batches if batch is None else (batch,), self.beside(budget_bytes)
        objectives = self.objectives(budget_bytes)

        def search(whole_batch: bool | None) -> Search:
            cuts = None if any_cuts or self.cuts is None else list(self.cuts)
            number = None if any_cuts else self.wanted_partitions
            return Search(self.profile, batches, cuts, number, self.micro_batch, objectives, beside, whole_batch)

        if not self.uniform:
            return search(True if self.whole_batches else None)
        smallest, most = self.profile.smallest_micro_batch, min(self.micro_batch or max(batches), *batches)
        can_be_whole = all(largest_micro_batch(size, most, smallest) == size for size in batches)
        ways = [True] if can_be_whole else []
        if not self.whole_batches and all(largest_micro_batch(size, smallest, smallest) < size for size in batches):
            ways.append(False)
        return UniformSearch([search(whole_batch) for whole_batch in ways])

    def title(self, start: int, stop: int) -> str:
        """Return a range of layers in words."""
        first, last = self.profile.layers[start].name, self.profile.layers[stop - 1].name
        whole = self.profile.layers[start].whole
        if stop == start + 1 and whole:
            return f"layer {first!r} ({whole})"
        return f"layer {first!r}" if stop == start + 1 else f"layers {first!r} to {last!r}"

    def _check_cuts(self) -> None:
        end, starts = len(self.profile.layers), possible_starts(self.profile)
        if self.cuts is not None:
            if any(not before < cut < end for before, cut in pairwise([0, *self.cuts])):
                possible = f"must be ascending and between 1 and {end - 1}" if end > 1 else "are none"
                raise ConfigError(
                    f"--cuts at layers {', '.join(map(str, self.cuts))}: the cuts of a model of {count(end, 'layer')} {possible}"
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
                f"--partitions {self.num_partitions}: this model of {count(end, 'layer')} can be cut into at most "
                f"{count(len(starts), 'partition')}; give a number from 1 to {len(starts)}"
            )

    def _check_samples(self) -> None:
        number, smallest = self.wanted_partitions, self.profile.smallest_micro_batch
        if len(self.batches) != 1 and len(self.batches) != number:
            partitions = "a number of partitions that is left open" if number is None else count(number, "partition")
            raise ConfigError(
                f"--batch-size has {count(len(self.batches), 'value')} for {partitions}; give one value, or as many "
                f"--partitions or --cuts"
            )
        if self.whole_batches and self.micro_batch is not None and self.micro_batch < max(self.batches):
            raise ConfigError(
                f"--micro-batch {self.micro_batch} of --batch-size {max(self.batches)}: a batch has to go through at once here, by --batch-norm "
                "refuse, or since its loss is not the mean of its parts' losses; leave --micro-batch out"
            )
        for name, size in (("--batch-size", min(self.batches)), ("--micro-batch", self.micro_batch or smallest)):
            if size < smallest:
                raise ConfigError(
                    f"{name} {size}: in train mode the model takes at least {count(smallest, 'sample')} at once (BatchNorm over "
                    f"single values needs them); give {name} {smallest} or more"
                )


def count(number: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> count(1, "cut"), count(2, "cut")
        ('1 cut', '2 cuts')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"

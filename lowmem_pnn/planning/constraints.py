"""Constraints on a plan: cuts, number of partitions, batches and micro-batch, checked against the chain."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.planning.search import Search, UniformSearch, possible_starts
from lowmem_pnn.profiling.costs import Affine, MemoryProfile
from lowmem_pnn.profiling.peaks import default_objective, largest_micro_batch

Objectives = Callable[[int], Affine]
"""Function from the layer after a partition's last to the bytes of the partition's objective."""

Beside = Callable[[int], Sequence[int]]
"""Function from a budget to the bytes beside a partition, for each layer that it may begin with, or end with."""


class Constraints:
    """Constraints on the partitions of one chain; arguments as for `planner.plan`.

    Raises:
        ConfigError: The chain cannot have such cuts, or such numbers of partitions or samples.
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
        whole_batches: bool = False,
        beside_bytes: Beside | None = None,
        ending_bytes: Beside | None = None,
    ) -> None:
        if cuts is not None and num_partitions not in (None, len(cuts) + 1):
            raise ConfigError(
                f"--partitions {num_partitions} and {count(len(cuts), 'cut')} in --cuts contradict each other; give one"
            )
        self.profile = profile
        self.batches = (batch_sizes,) if isinstance(batch_sizes, int) else tuple(batch_sizes)
        self.cuts = None if cuts is None else list(cuts)
        self.num_partitions = num_partitions if cuts is None else len(cuts) + 1
        self.micro_batch = micro_batch
        self.uniform = uniform
        self.whole_batches = whole_batches
        self._beside_bytes, self._ending_bytes = beside_bytes, ending_bytes
        self._objectives = [
            objective(stop) if objective else default_objective(layer) for stop, layer in enumerate(profile.layers, start=1)
        ]
        self._check_cuts()
        self._check_samples()

    def batch_of(self, number: int) -> int:
        """Return the batch of a partition, in samples."""
        return self.batches[0] if len(self.batches) == 1 else self.batches[number]

    def beside(self, budget_bytes: int) -> Sequence[int]:
        """Return the bytes beside a partition under a budget, for each layer that it may begin with.

        Args:
            budget_bytes: The budget.
        """
        return [0] * len(self.profile.layers) if self._beside_bytes is None else self._beside_bytes(budget_bytes)

    def objectives(self, budget_bytes: int) -> list[Affine]:
        """Return the bytes of a partition's objective, and what else its end takes, for each layer that may be its last.

        Args:
            budget_bytes: The budget.
        """
        ends = [0] * len(self._objectives) if self._ending_bytes is None else self._ending_bytes(budget_bytes)
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
            cuts, number = (None, None) if any_cuts else (self.cuts, self.num_partitions)
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
        number, smallest = self.num_partitions, self.profile.smallest_micro_batch
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

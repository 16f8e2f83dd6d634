"""Programs: a method's visits and sweeps as a run goes through them, for a model that may be frozen in part, and for one process of several."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from lowmem_pnn.methods.base import Method
from lowmem_pnn.methods.visits import SplitName, Sweep, Visit, sweep_visits

Spans = Sequence[tuple[int, int]]
"""First layer of each partition, and the layer after its last."""


@dataclass(frozen=True)
class Learning:
    """What a model learns where it is frozen in part.

    Args:
        learns: For each layer, whether any of its parameters learns.
        changes_buffers: Whether a forward of a layer changes its buffers.
        fixed_layers: Number of first layers whose outputs are written once, for all epochs.
    """

    learns: Sequence[bool]
    changes_buffers: Callable[[int], bool]
    fixed_layers: int

    def learns_in(self, span: tuple[int, int]) -> bool:
        """Return whether a partition learns.

        Args:
            span: First layer of the partition, and the layer after its last.
        """
        return any(self.learns[slice(*span)])

    def changes_buffers_in(self, span: tuple[int, int]) -> bool:
        """Return whether a forward of a partition changes its buffers.

        Args:
            span: First layer of the partition, and the layer after its last.
        """
        return any(map(self.changes_buffers, range(*span)))


def program_of(
    method: Method, spans: Spans, splits: Collection[SplitName], learning: Learning, at_first: Learning | None = None
) -> list[Visit | Sweep]:
    """Return the visits and sweeps of a whole run.

    Args:
        method: Training method.
        spans: Spans of the partitions.
        splits: Splits that training reads, as for `Method.visits`.
        learning: What the model learns.
        at_first: What it learns before `unfreeze_at`; None without that.
    """
    program, until = method.program(len(spans), splits), method.config.unfreeze_at
    if not method.sweeps:
        alone = [_as_it_learns(item, spans, learning) for item in program]
        if at_first is None:
            return alone
        assert until is not None
        return [*alone[0].unfrozen_at(until), *alone[1:]]
    items: list[Visit | Sweep] = []
    for item in program:
        if not isinstance(item, Sweep) or item.phase != "epoch":
            items.append(item)
        elif at_first is None:
            items += _sweep_of_what_learns(item, spans, learning, method)
        else:
            assert until is not None
            first, rest = item.unfrozen_at(until)
            items += _sweep_of_what_learns(first, spans, at_first, method)
            items += _sweep_of_what_learns(rest, spans, learning, method)
    return items


def _as_it_learns(item: Visit | Sweep, spans: Spans, learning: Learning) -> Visit | Sweep:
    """Return an item of a program, with no epochs where it is a visit of a partition in which nothing learns."""
    if isinstance(item, Sweep) or item.action != "learn" or learning.learns_in(spans[item.partition]):
        return item
    return dataclasses.replace(item, epochs=0)


def _sweep_of_what_learns(sweep: Sweep, spans: Spans, learning: Learning, method: Method) -> list[Visit | Sweep]:
    """Return a sweep without the visits that frozen partitions do not need, after those that write outputs of fixed layers once."""
    if all(learning.learns):
        return [sweep]
    learners = [number for number, span in enumerate(spans) if learning.learns_in(span)]
    frozen = [number for number in range(len(spans)) if number not in learners]
    updaters = [number for number in frozen if learning.changes_buffers_in(spans[number])]
    visits = sweep_visits(len(spans), learners, deferred=method.config.steps_wait, updaters=updaters, trains=True)
    fixed = sum(stop <= learning.fixed_layers for _, stop in spans)
    visits = tuple(visit for visit in visits if visit.partition >= fixed)
    return [*(Visit("emit", number, "train") for number in range(fixed)), dataclasses.replace(sweep, visits=visits)]


def visits_of_rank(program: Sequence[Visit | Sweep], rank: int, ranks: int) -> list[Visit | Sweep]:
    """Return the share of one process in a program whose partitions are independent.

    Every rank trains the partition of its number; rank 0 joins all partitions and does what follows.

    Args:
        program: Visits and sweeps of the whole run.
        rank: Rank of the process, from 0.
        ranks: Number of processes; a single one does everything.

    Example:
        >>> program = [Visit("learn", 0, "train"), Visit("learn", 1, "train", from_synthetic_labels=True)]
        >>> [(visit.action, visit.partition) for visit in visits_of_rank(program, 0, 2)]
        [('learn', 0), ('join', 0)]
    """
    if ranks == 1:
        return list(program)
    own: list[Visit | Sweep] = [item for item in program if isinstance(item, Visit) and item.partition == rank]
    return own if rank else [*own, Visit("join", 0, "train"), *(item for item in program if isinstance(item, Sweep))]

"""The live line of a terminal: two lines of text about a run, which fit any width."""

from collections.abc import Sequence

from lowmem_pnn.reporting.run_status import RunStatus
from lowmem_pnn.units import clock_text, format_bytes

_SHORTEST_BAR, _LONGEST_BAR, _MEMORY_BAR = 8, 60, 8


def live_lines(
    status: RunStatus,
    title: str,
    epoch: str,
    *,
    rate: float | None = None,
    seconds_left: tuple[float | None, float | None] = (None, None),
    width: int = 80,
    letters: str = "━─█░·",
) -> list[str]:
    """Return two lines about a run, neither wider than asked.

    Args:
        status: how far the run is.
        title: what learns: a partition, or all of them.
        epoch: the epoch under way, in words.
        rate: samples a second; None while it is not known.
        seconds_left: predicted seconds until this partition's epochs are over, and until the run's are.
        width: columns of the terminal.
        letters: what is done of the bar, what is not; memory in use, and free; what stands between facts.

    Example:
        >>> status = RunStatus(num_samples=50, loss=0.5, used_bytes=90_000_000, budget_bytes=100_000_000, run_share=0.5)
        >>> for line in live_lines(status, "partition 1 of 2", "epoch 1 of 3", rate=912, width=64, letters="=-#.|"): print(line)
         50 % =============------------- partition 1 of 2 | epoch 1 of 3
        loss 0.5 | 912 samples/s | #######. 90.0 MB of 100.0 MB
    """
    done, open_, used, free, dot = tuple(letters)
    percent = f"{100 * min(status.run_share, 1.0):3.0f} %"
    facts = [title, epoch]
    partition, run = seconds_left
    if run is not None:
        parts = f"{clock_text(partition)} left, {clock_text(run)} in all" if partition is not None else f"{clock_text(run)} left"
        facts.append(parts)
    said = _joined(facts, dot, width - len(percent) - 2 - _SHORTEST_BAR)
    length = min(_LONGEST_BAR, width - len(percent) - len(said) - 2)
    first = f"{percent} {_bar(status.run_share, length, done, open_)} {said}"
    share = status.used_bytes / max(1, status.budget_bytes)
    memory = f"{format_bytes(status.used_bytes)} of {format_bytes(status.budget_bytes)}"
    facts = [f"{_bar(share, _MEMORY_BAR, used, free)} {memory}"]
    if rate is not None:
        facts.insert(0, f"{rate:.0f} samples/s" if rate >= 10 else f"{rate:.2g} samples/s")
    if status.loss is not None:
        facts.insert(0, f"loss {status.loss:.4g}")
    if status.written_bytes:
        facts.append(f"written {format_bytes(status.written_bytes)}")
    return [first[:width], _joined(facts, dot, width)]


def _bar(share: float, length: int, done: str, open_: str) -> str:
    filled = round(min(max(share, 0.0), 1.0) * length)
    return done * filled + open_ * (length - filled)


def _joined(facts: Sequence[str], dot: str, width: int) -> str:
    """Return as many facts as fit, the first in any case."""
    said = facts[0][: max(width, 0)]
    for fact in facts[1:]:
        longer = f"{said} {dot} {fact}"
        if len(longer) <= width:
            said = longer
    return said

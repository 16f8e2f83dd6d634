"""A finished run as its page shows it: its result, its options, and the lines that it logged."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.finished import open_finished
from lowmem_pnn.stores.run_directory import RunDirectory


@dataclass(frozen=True)
class RunLog:
    """A finished run, as far as its page shows it.

    Args:
        path: folder of the run.
        result: what it came to.
        config: its options.
        lines: lines of `metrics.jsonl`, those that are whole.
    """

    path: Path
    result: Result
    config: FitConfig
    lines: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "RunLog":
        """Read a run.

        Args:
            path: its folder.

        Raises:
            CheckpointError: it has not finished, or a file of it is missing or damaged.
            ConfigError: there is no run.
        """
        with RunDirectory.open(path, to_read=True) as rundir:
            finished = open_finished(rundir)
        log = path / "metrics.jsonl"
        texts = log.read_text(errors="replace").splitlines() if log.exists() else []
        return cls(path, finished.result, finished.config, [line for text in texts if (line := _parsed(text)) is not None])

    @property
    def name(self) -> str:
        """What the run is called beside others."""
        return self.path.name

    @property
    def memory(self) -> list[tuple[float, int, int]]:
        """The timeline of memory: seconds, number of the partition, and the highest bytes in use until then since the point before."""
        points = [point for line in self.lines for point in line.get("memory", ())]
        return [(float(seconds), int(partition), int(size)) for seconds, partition, size in points]

    @property
    def epochs(self) -> list[Mapping[str, Any]]:
        """Lines that tell of a whole epoch."""
        return [line for line in self.lines if "train_loss" in line]

    @property
    def seconds_by_use(self) -> list[dict[str, float]]:
        """Seconds of each partition: computing, and waiting for each of what is waited for."""
        uses = []
        for partition in self.result.partitions:
            waited = dict(partition.get("waited", {}))
            uses.append({"computing": max(0.0, partition["seconds"] - sum(waited.values())), **waited})
        return uses


def _parsed(text: str) -> dict[str, Any] | None:
    """Return a line of the log; None for one that a kill has cut off."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None

"""A finished run as its page shows it: its result, its options, and the lines that it logged."""

import dataclasses
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
        name: what the run is called beside others.
    """

    path: Path
    result: Result
    config: FitConfig
    lines: Sequence[Mapping[str, Any]]
    name: str

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
        texts = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        lines = [line for text in texts if (line := _parsed(text)) is not None]
        return cls(path, finished.result, finished.config, lines, names_apart([path])[0])

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


def read_runs(paths: Sequence[Path]) -> list[RunLog]:
    """Read runs that stand on one page, each called by as much of its path as tells it from the others.

    Args:
        paths: their folders.

    Raises:
        CheckpointError: one has not finished, or a file of it is missing or damaged.
        ConfigError: there is no run.
    """
    runs = [RunLog.read(path) for path in paths]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names_apart(paths), strict=True)]


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: its last part, or as many of the last parts as make all names differ.

    Args:
        paths: folders; one that is named twice has one name.

    Example:
        >>> names_apart([Path("/a/run"), Path("/b/run")]), names_apart([Path("/a/x"), Path("/a/y")])
        (['a/run', 'b/run'], ['x', 'y'])
    """
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*each[-count:])) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [name.encode(errors="backslashreplace").decode() for name in names]  # which need not be text


def _parsed(text: str) -> dict[str, Any] | None:
    """Return a line of the log; None for one that a kill has cut off."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None

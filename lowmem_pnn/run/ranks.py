"""Ranks: partitions that train side by side, a process each; the first one joins them.

    torchrun --nproc-per-node 3 -m lowmem_pnn fit --method pnn --parallel-sil --partitions 3 --workdir DIR ...

    rank 0, DIR         learn partition 1 ------------ join -- recovery, test, export
    rank 1, DIR.rank1   learn partition 2 -- trained --^
    rank 2, DIR.rank2   learn partition 3 -- trained --^

Each rank is a run of its own, with its own budget and its own commits. Nothing crosses while they train; torchrun only starts the
processes, and ends all when one fails. The folders are beside each other, on a file system that all ranks see.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError


@dataclass(frozen=True)
class Rank:
    """One process of several.

    Args:
        number: number of the process, from 0, and of the partition that it trains.
        size: number of processes.
        local: number of the process on its machine, which is its GPU's.
    """

    number: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> "Rank":
        """Return the process that torchrun's variables name, or the only one.

        Raises:
            ConfigError: the variables are no such numbers.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            number, size, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
            if not 0 <= number < size or local < 0:
                raise ValueError
        except ValueError:
            variables = ", ".join(f"{name}={os.environ.get(name, default)}" for name, default in _VARIABLES)
            raise ConfigError(f"the environment has {variables}, which are not torchrun's; unset them") from None
        return cls(number, size, local)

    @property
    def is_alone(self) -> bool:
        """Whether this process trains all partitions."""
        return self.size == 1

    def folder(self, workdir: Path) -> Path:
        """Return the process's own folder.

        Args:
            workdir: folder of the whole run, or the process's own.
        """
        return workdir if self.number and workdir.suffix == f".rank{self.number}" else rank_folder(workdir, self.number)

    def check(self, config: FitConfig) -> None:
        """Refuse what several processes cannot share.

        Args:
            config: options of the run.

        Raises:
            ConfigError: anything but independent partitions, or another number of them than of processes.
        """
        if self.is_alone:
            return
        if not config.parallel_sil:
            raise ConfigError(
                f"torchrun started {self.size} processes, and partitions train side by side only with --method pnn --parallel-sil; "
                "give that, or start one process"
            )
        asked = len(config.cuts) + 1 if config.cuts else config.partitions
        if asked != self.size:
            chosen = "the planner is to choose the partitions" if asked is None else f"there are {asked} partitions"
            raise ConfigError(
                f"torchrun started {self.size} processes, and {chosen}; give --partitions {self.size}, or as many --cuts"
            )


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def rank_folder(workdir: Path, number: int) -> Path:
    """Return the folder of a process.

    Args:
        workdir: folder of the whole run, which is the first process's.
        number: number of the process.
    """
    if not number:
        return workdir
    # '.' and '..' have no name to add to.
    whole = workdir if workdir.name not in ("", "..") else workdir.resolve()
    return whole.with_name(f"{whole.name}.rank{number}")


ALONE = Rank()
"""The only process."""

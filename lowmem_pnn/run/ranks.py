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
        number: from 0; trains the partition of that number.
        of: how many there are.
        local: its number on its machine, which is its GPU's.
    """

    number: int = 0
    of: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> "Rank":
        """As torchrun says, or the only one.

        Raises:
            ConfigError: the variables are no such numbers.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            number, of, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
            if not 0 <= number < of or local < 0:
                raise ValueError
        except ValueError:
            found = ", ".join(f"{name}={os.environ.get(name, default)}" for name, default in _VARIABLES)
            raise ConfigError(f"the environment has {found}, which are not torchrun's; unset them") from None
        return cls(number, of, local)

    @property
    def is_alone(self) -> bool:
        """Whether this process trains all partitions."""
        return self.of == 1

    def folder(self, workdir: Path) -> Path:
        """The rank's own folder, given the whole run's, or its own."""
        return workdir if self.number and workdir.suffix == f".rank{self.number}" else rank_folder(workdir, self.number)

    def check(self, config: FitConfig) -> None:
        """Refuse what several processes cannot share.

        Args:
            config: the run's.

        Raises:
            ConfigError: anything but partitions that train apart, or another number of them.
        """
        if self.is_alone:
            return
        if not config.parallel_sil:
            raise ConfigError(
                f"torchrun started {self.of} processes, and partitions train side by side only with --method pnn --parallel-sil; "
                "give that, or start one process"
            )
        asked = len(config.cuts) + 1 if config.cuts else config.partitions
        if asked != self.of:
            found = "the planner is to choose the partitions" if asked is None else f"there are {asked} partitions"
            raise ConfigError(
                f"torchrun started {self.of} processes, and {found}; give --partitions {self.of}, or as many --cuts"
            )


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def rank_folder(workdir: Path, number: int) -> Path:
    """A rank's folder, given the whole run's, which is the first one's."""
    if not number:
        return workdir
    # '.' and '..' have no name to add to.
    whole = workdir if workdir.name not in ("", "..") else workdir.resolve()
    return whole.with_name(f"{whole.name}.rank{number}")


ALONE = Rank()
"""The only process."""

"""The run that `fit` is asked for, as a command or from Python: one that is to begin, or one to go on with, and its folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.workdir import next_workdir
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.memory.available import is_share
from lowmem_pnn.run.ranks import ALONE, Rank
from lowmem_pnn.run.unfinished import unfinished_run


@dataclass(frozen=True)
class AskedRun:
    """A run that `fit` is asked for.

    Args:
        folder: folder of the run, or of this process's part in it.
        given: fields of `FitConfig` that were given. A run that goes on keeps its budget where a share of memory was given for one.
        config: options of a run that is to begin; None where one goes on.
    """

    folder: Path
    given: Mapping[str, Any]
    config: FitConfig | None = None


def asked_run(
    given: Mapping[str, Any],
    configured: Callable[[], FitConfig],
    workdir: Path | None,
    *,
    resume: bool,
    overwrite: bool,
    rank: Rank = ALONE,
) -> AskedRun:
    """Return the run that `fit` is asked for.

    Args:
        given: fields of `FitConfig` that were given.
        configured: makes the options of a run that is to begin.
        workdir: folder that was given; None for the next free one, or for that of the only unfinished run with these options.
        resume: whether a run goes on.
        overwrite: whether a run that begins replaces the one that is there.
        rank: which of several processes this is.

    Raises:
        ConfigError: a run cannot both go on and be replaced, the options cannot be used, or no one run is meant.
    """
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run, and --overwrite replaces it; give one")
    if resume:
        kept = {name: value for name, value in given.items() if name != "max_gpu_mem" or not is_share(value)}
        return AskedRun(rank.folder(workdir or unfinished_run(kept)), kept)
    config = configured()
    rank.check(config)
    return AskedRun(rank.folder(workdir or next_workdir(config)), given, config)

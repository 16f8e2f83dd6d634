"""Unfinished runs under a folder: the one that a command without `--workdir` goes on with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import began_alike, raised, resumed_config
from lowmem_pnn.errors import CheckpointError, ConfigError, DiskError
from lowmem_pnn.stores.disk import RUN_REMEDY, read_file
from lowmem_pnn.stores.journal import read_journal
from lowmem_pnn.stores.run_directory import read_config


def unfinished_run(options: Mapping[str, Any], parent: Path = Path("runs")) -> Path:
    """Return the folder of the only unfinished run that was begun with the same options.

    Where `max_gpu_mem` is given, the options are a whole command, and the run must have begun with that command; else they are some
    of those that it began with, or none. Options that change nothing in a result are not compared.

    Args:
        options: fields of `FitConfig`; None means not given.
        parent: folder that holds runs.

    Raises:
        ConfigError: there is none, or there are several.
    """
    unfinished = {path: stored for path in sorted(parent.glob("*")) if (stored := _unfinished_config(path)) is not None}
    if options.get("max_gpu_mem") is None:
        matches = [path for path, stored in unfinished.items() if _agrees(stored, options, path)]
    else:
        config = configure(**options)
        matches = [path for path, stored in unfinished.items() if began_alike(config, stored)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"--resume: several unfinished runs began with these options: {_listed(matches)}; give --workdir DIR")
    if unfinished:
        raise ConfigError(
            f"--resume: no unfinished run in {parent} began with these options; unfinished there: {_listed(unfinished)}; "
            "give --workdir DIR, or leave --resume out to begin"
        )
    raise ConfigError(f"--resume: there is no unfinished run in {parent}; give --workdir DIR, or leave --resume out to begin")


def options_of_run(path: Path) -> FitConfig:
    """Return the options of a run, with the epochs that a resume has raised them to.

    Args:
        path: folder of the run.

    Raises:
        CheckpointError: no run is there, or it is damaged.
        DiskError: the file system refused.
    """
    journal, config_sha256 = read_journal(path / "journal.json")
    return raised(FitConfig.from_json(read_config(path, config_sha256)), journal)


def _unfinished_config(path: Path) -> FitConfig | None:
    """Return the options of a run that has not finished; None where a folder holds none, or none that can be read."""
    try:
        journal, _ = read_journal(path / "journal.json")
        # A process of several, which is not the first, goes on with the first one's folder.
        if journal.get("stage") in (None, "done") or journal.get("rank", 0):
            return None
        return raised(FitConfig.from_json(read_file(path / "config.json", RUN_REMEDY).decode(errors="replace")), journal)
    except (CheckpointError, DiskError, OSError):
        return None


def _agrees(stored: FitConfig, options: Mapping[str, Any], path: Path) -> bool:
    try:
        resumed_config(stored, options, path)
    except ConfigError:
        return False
    return True


def _listed(paths: Mapping[Path, object] | list[Path]) -> str:
    return ", ".join(map(str, paths))
